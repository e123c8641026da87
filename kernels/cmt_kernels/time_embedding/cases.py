"""Cases of time_embedding."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = (torch.float32,)
GRADS = ()


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    dim: int
    max_frequency: float = 32.0
    k: int | None = None


CASES = tuple(Case(8, 32, 32.0, k) for k in tangent_rows(8)) + (Case(5, 4), Case(77, 6, 100.0, 1))
BENCH = tuple(Case(8, 256, 32.0, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    t = Draw(dtype, device).dual(case.k, case.B)
    return {"t": t, "dim": case.dim, "max_frequency": case.max_frequency}


def case_of(t, dim, max_frequency) -> Case:
    return Case(len(value(t)), dim, max_frequency, rows(t))


def nbytes(case: Case, itemsize: int) -> int:
    return (case.B + (case.k or 0)) * (itemsize + case.dim * max(itemsize, 4))


def flops(case: Case) -> int:
    """One product for two features, then cos or sin; the tangent has two products."""
    return (3 * case.B + 4 * (case.k or 0)) * case.dim // 2
