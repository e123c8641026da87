"""Cases of attention."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("qkv",)


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    H: int
    d: int
    k: int | None = None


CASES = tuple(Case(8, 7, 2, 8, k) for k in tangent_rows(8)) + (
    Case(5, 77, 2, 36),
    Case(5, 77, 1, 72, 1),
    Case(3, 33, 2, 64, 3),
)
BENCH = tuple(Case(8, 256, 12, 64, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return {"qkv": Draw(dtype, device).dual(case.k, case.B, case.T, 3, case.H, case.d)}


def case_of(qkv) -> Case:
    b, t, _, h, d = value(qkv).shape
    return Case(b, t, h, d, rows(qkv))


def nbytes(case: Case, itemsize: int) -> int:
    return 4 * (case.B + (case.k or 0)) * case.T * case.H * case.d * itemsize


def flops(case: Case) -> int:
    """Two T x T x d products a head for a value, four more for its tangent."""
    return (4 * case.B + 8 * (case.k or 0)) * case.T**2 * case.H * case.d
