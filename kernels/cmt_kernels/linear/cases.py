"""Cases of linear."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "weight", "bias")


@dataclass(frozen=True)
class Case(BaseCase):
    """T None: x is (B, D), as in the conditioning."""

    B: int
    T: int | None
    D: int
    E: int
    bias: bool = True
    k: int | None = None


CASES = tuple(Case(8, 5, 24, 16, True, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72, 40, False),
    Case(5, 77, 72, 40, False, 1),
    Case(5, None, 72, 432, True, 5),
)
BENCH = tuple(Case(8, 256, 768, 3072, True, k) for k in (None, 2, 8)) + (Case(8, None, 768, 4608, True, 2),)


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    shape = (case.B, case.D) if case.T is None else (case.B, case.T, case.D)
    return {
        "x": draw.dual(case.k, *shape),
        "weight": draw.normal(case.E, case.D, std=case.D**-0.5),
        "bias": draw.normal(case.E) if case.bias else None,
    }


def case_of(x, weight, bias) -> Case:
    b, *tokens, d = value(x).shape
    return Case(b, math.prod(tokens) if tokens else None, d, len(weight), bias is not None, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    activations = (case.B + (case.k or 0)) * (case.T or 1) * (case.D + case.E)
    return (activations + case.D * case.E + case.bias * case.E) * itemsize


def flops(case: Case) -> int:
    return 2 * (case.B + (case.k or 0)) * (case.T or 1) * case.D * case.E
