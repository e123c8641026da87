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
    """order: how many predictions enter; per_row: each row has its own coefficients; last: nothing follows the step."""

    B: int
    shape: tuple[int, ...]
    order: int
    guided: bool = False
    per_row: bool = False
    last: bool = False


CASES = (
    *(Case(5, (3, 7, 11), order, guided, per_row) for order in (1, 2, 3) for guided, per_row in ((False, True), (True, False))),
    Case(77, (2,), 3, True, True),
    Case(77, (2,), 2, last=True),
)  # fmt: skip
BENCH = (
    Case(8, (4, 32, 32), 3),
    Case(8, (768, 16, 16), 1),
    Case(8, (768, 16, 16), 3),
    Case(8, (768, 16, 16), 3, True),
    Case(8, (768, 16, 16), 3, False, True),
)


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    x, m1, m2 = (draw.normal(case.B, *case.shape) for _ in range(3))
    f = draw.normal(case.B * (1 + case.guided), *case.shape)
    coefficients = draw.normal(case.B, 8) if case.per_row else draw.normal(8)
    m1, m2 = m1 if case.order > 1 else None, m2 if case.order > 2 else None
    return {"x": x, "f": f, "m1": m1, "m2": m2, "coefficients": coefficients, "keep": not case.last}


def case_of(x, f, m1, m2, coefficients, keep, y) -> Case:
    order = 1 + (m1 is not None) + (m2 is not None)
    return Case(len(x), tuple(x.shape[1:]), order, len(f) > len(x), coefficients.ndim == 2, not keep)


def nbytes(case: Case, itemsize: int) -> int:
    tensors = 1 + (1 + case.guided) + (case.order - 1) + (1 if case.last else 3)
    return (case.B * tensors * math.prod(case.shape) + 8 * (case.B if case.per_row else 1)) * itemsize


def flops(case: Case) -> int:
    return case.B * (6 + 3 * case.guided + 2 * (case.order - 1) + (not case.last)) * math.prod(case.shape)
