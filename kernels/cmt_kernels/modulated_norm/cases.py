"""Cases of modulated_norm."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "shift", "scale")


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    D: int
    k: int | None = None
    stream: bool = False  # x in fp32 at least, whatever the dtype of the others


CASES = tuple(Case(8, 5, 24, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72),
    Case(5, 77, 72, 1),
    Case(5, 77, 72, 5),
    Case(3, 1, 1152, 2),
    *(Case(5, 77, 72, k, stream=True) for k in (None, 2)),
)
BENCH = (
    *(Case(8, 256, 768, k) for k in (None, 2, 8)),
    *(Case(8, 256, 768, k, True) for k in (None, 2)),
)


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw, stream = (
        Draw(dtype, device),
        Draw(torch.promote_types(dtype, torch.float32) if case.stream else dtype, device, seed=11),
    )
    return {
        "x": stream.dual(case.k, case.B, case.T, case.D, std=2.0),
        "shift": draw.dual(case.k, case.B, case.D, std=0.5),
        "scale": draw.dual(case.k, case.B, case.D, std=0.5),
    }


def case_of(x, shift, scale, eps, also_x) -> Case:
    return Case(*value(x).shape, rows(x, shift, scale), value(x).dtype != value(shift).dtype)


def nbytes(case: Case, itemsize: int) -> int:
    x = 4 if case.stream else itemsize
    return (case.B + (case.k or 0)) * (case.T * (x + itemsize) + 2 * itemsize) * case.D


def flops(case: Case) -> int:
    """Mean, variance, normalise and modulate: 8 an element; 12 for the tangent with its two means."""
    return (8 * case.B + 12 * (case.k or 0)) * case.T * case.D
