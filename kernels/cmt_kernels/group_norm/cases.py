"""Cases of group_norm."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "weight", "bias")


@dataclass(frozen=True)
class Case(BaseCase):
    """G groups of C channels, images of side S."""

    B: int
    C: int
    S: int
    G: int
    k: int | None = None


CASES = tuple(Case(8, 6, 3, 2, k) for k in tangent_rows(8)) + (Case(3, 20, 5, 5), Case(3, 7, 2, 1, 2))
BENCH = tuple(Case(8, 256, 32, 32, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "x": draw.dual(case.k, case.B, case.C, case.S, case.S, std=2.0),
        "weight": draw.normal(case.C, mean=1.0, std=0.3),
        "bias": draw.normal(case.C),
        "groups": case.G,
    }


def case_of(x, weight, bias, groups, eps) -> Case:
    """Of square images."""
    b, c, s, _ = value(x).shape
    return Case(b, c, s, groups, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * ((case.B + (case.k or 0)) * case.S**2 + 1) * case.C * itemsize


def flops(case: Case) -> int:
    """Mean, variance, normalise, weight and bias: 8 an element; 10 for the tangent with its two means."""
    return (8 * case.B + 10 * (case.k or 0)) * case.C * case.S**2
