"""Cases of clip."""

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
    limit: float = 1.5
    k: int | None = None


CASES = tuple(Case(8, 24, 1.5, k) for k in tangent_rows(8)) + (Case(5, 77), Case(5, 77, 0.5, 1))
BENCH = tuple(Case(8, 256 * 32 * 32, 1.5, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return {"x": Draw(dtype, device).dual(case.k, case.B, case.D, std=2.0), "limit": case.limit}


def case_of(x, limit) -> Case:
    b, *shape = value(x).shape
    return Case(b, math.prod(shape), limit, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * (case.B + (case.k or 0)) * case.D * itemsize


def flops(case: Case) -> int:
    return (2 * case.B + 2 * (case.k or 0)) * case.D
