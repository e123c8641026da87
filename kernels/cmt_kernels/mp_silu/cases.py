"""Cases of mp_silu."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "scale")


@dataclass(frozen=True)
class Case(BaseCase):
    """T: pixels of an image, in a column, or 1 for rows (B, D); scaled: with a scale."""

    B: int
    T: int
    D: int
    scaled: bool = True
    k: int | None = None


CASES = tuple(Case(8, 5, 24, True, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72, False),
    Case(5, 77, 72, False, 1),
    Case(5, 77, 72, True, 5),
)
BENCH = tuple(Case(8, 4096, 192, scaled, k) for scaled in (True, False) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    sizes = (case.T, 1) if case.T > 1 else ()
    return {
        "x": draw.dual(case.k, case.B, case.D, *sizes, std=2.0),
        "scale": draw.dual(case.k, case.B, case.D, std=0.5) if case.scaled else None,
    }


def case_of(x, scale, also_x) -> Case:
    b, d, *sizes = value(x).shape
    return Case(b, value(x)[:1, :1].numel() if sizes else 1, d, scale is not None, rows(x, scale))


def nbytes(case: Case, itemsize: int) -> int:
    return (case.B + (case.k or 0)) * (2 * case.T + case.scaled) * case.D * itemsize


def flops(case: Case) -> int:
    """A product, an exponential, a sum, a quotient, a product; the tangent is the derivative, of 6, and up to two products."""
    return (5 * case.B + 9 * (case.k or 0)) * case.T * case.D
