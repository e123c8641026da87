"""Cases of gelu."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "bias")


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    D: int
    bias: bool = True
    k: int | None = None


CASES = tuple(Case(8, 5, 24, True, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72, False),
    Case(5, 77, 72, False, 1),
    Case(5, 77, 72, True, 5),
)
BENCH = tuple(Case(8, 256, 3072, True, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "x": draw.dual(case.k, case.B, case.T, case.D, std=2.0),
        "bias": draw.normal(case.D) if case.bias else None,
    }


def case_of(x, bias) -> Case:
    b, *tokens, d = value(x).shape
    return Case(b, math.prod(tokens), d, bias is not None, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return (2 * (case.B + (case.k or 0)) * case.T + case.bias) * case.D * itemsize


def flops(case: Case) -> int:
    """x + b, a cubic, tanh and two products; the tangent is the derivative, with the tanh already there, times x."""
    return ((9 + case.bias) * case.B + 10 * (case.k or 0)) * case.T * case.D
