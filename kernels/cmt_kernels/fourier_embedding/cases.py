"""Cases of fourier_embedding."""

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
    n: int
    phase: bool = True
    k: int | None = None


CASES = tuple(Case(8, 16, True, k) for k in tangent_rows(8)) + (Case(5, 3, False), Case(77, 6, False, 1))
BENCH = tuple(Case(8, 256, True, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "t": draw.dual(case.k, case.B),
        "frequency": draw.normal(case.n, std=6.0),
        "phase": draw.uniform(case.n, high=6.0) if case.phase else None,
    }


def case_of(t, frequency, phase) -> Case:
    return Case(len(value(t)), len(frequency), phase is not None, rows(t))


def nbytes(case: Case, itemsize: int) -> int:
    rows = case.B + (case.k or 0)
    return (
        rows * (itemsize + (1 if case.phase else 2) * case.n * max(itemsize, 4)) + (1 + case.phase) * case.n * itemsize
    )


def flops(case: Case) -> int:
    """A product, a sum and a wave a feature; three products and a wave for a tangent."""
    return (3 * case.B + 4 * (case.k or 0)) * case.n * (1 if case.phase else 2)
