"""Cases of modulated_rms_norm."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "weight", "shift", "scale")


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    D: int
    k: int | None = None


CASES = tuple(Case(8, 5, 24, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72),
    Case(5, 77, 72, 1),
    Case(5, 77, 72, 5),
    Case(3, 1, 1152, 2),
)
BENCH = tuple(Case(8, 256, 768, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "x": draw.dual(case.k, case.B, case.T, case.D, std=2.0),
        "weight": draw.normal(case.D, mean=1.0, std=0.3),
        "shift": draw.dual(case.k, case.B, case.D, std=0.5),
        "scale": draw.dual(case.k, case.B, case.D, std=0.5),
    }


def case_of(x, weight, shift, scale, eps) -> Case:
    return Case(*value(x).shape, rows(x, shift, scale))


def nbytes(case: Case, itemsize: int) -> int:
    return (2 * (case.B + (case.k or 0)) * (case.T + 1) + 1) * case.D * itemsize


def flops(case: Case) -> int:
    """Mean square, normalise, weigh and modulate: 6 an element; 10 for the tangent with its mean."""
    return (6 * case.B + 10 * (case.k or 0)) * case.T * case.D
