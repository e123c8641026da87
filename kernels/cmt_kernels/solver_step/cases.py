"""Cases of solver_step."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw

DTYPES = LOW
GRADS = ()


@dataclass(frozen=True)
class Case(BaseCase):
    """order: how many predictions enter; per_row: each row has its own coefficients."""

    B: int
    shape: tuple[int, ...]
    order: int
    per_row: bool = False


CASES = tuple(Case(5, (3, 7, 11), order, per_row) for order in (1, 2, 3) for per_row in (False, True)) + (
    Case(77, (2,), 3, True),
)
BENCH = (Case(8, (4, 32, 32), 3), Case(8, (768, 16, 16), 1), Case(8, (768, 16, 16), 3), Case(8, (768, 16, 16), 3, True))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    x, *predictions = (draw.normal(case.B, *case.shape) for _ in range(1 + case.order))
    m0, m1, m2 = predictions + [None] * (3 - case.order)
    coefficients = draw.normal(case.B, 4) if case.per_row else draw.normal(4)
    coefficients[..., 1 + case.order :] = 0
    return {"x": x, "m0": m0, "m1": m1, "m2": m2, "coefficients": coefficients}


def nbytes(case: Case, itemsize: int) -> int:
    return (case.B * (2 + case.order) * math.prod(case.shape) + 4 * (case.B if case.per_row else 1)) * itemsize


def flops(case: Case) -> int:
    return case.B * (1 + 2 * case.order) * math.prod(case.shape)
