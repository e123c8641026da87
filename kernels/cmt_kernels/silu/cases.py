"""Cases of silu."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x",)


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    D: int
    k: int | None = None


CASES = tuple(Case(8, 24, k) for k in tangent_rows(8)) + (Case(5, 77), Case(5, 77, 1))
BENCH = tuple(Case(8, 768, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return {"x": Draw(dtype, device).dual(case.k, case.B, case.D, std=2.0)}


def case_of(x) -> Case:
    b, *shape = value(x).shape
    return Case(b, math.prod(shape), rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * (case.B + (case.k or 0)) * case.D * itemsize


def flops(case: Case) -> int:
    return (4 * case.B + 5 * (case.k or 0)) * case.D
