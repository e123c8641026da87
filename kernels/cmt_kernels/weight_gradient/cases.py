"""Cases of weight_gradient."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw

DTYPES = LOW
GRADS = ()
MUTATED = ("g",)


@dataclass(frozen=True)
class Case(BaseCase):
    """T None: dy and x have no tokens, as in the conditioning."""

    B: int
    T: int | None
    D: int
    E: int


CASES = (Case(8, 5, 24, 16), Case(5, 77, 72, 40), Case(5, None, 72, 432), Case(1, 1, 8, 8))
BENCH = (Case(8, 256, 768, 3072), Case(8, 256, 3072, 768), Case(8, None, 768, 4608))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw, wide = Draw(dtype, device), Draw(torch.promote_types(dtype, torch.float32), device, seed=11)
    rows = (case.B,) if case.T is None else (case.B, case.T)
    return {
        "g": wide.normal(case.E, case.D),
        "dy": draw.normal(*rows, case.E, std=math.prod(rows) ** -0.5),
        "x": draw.normal(*rows, case.D),
    }


def case_of(g, dy, x) -> Case:
    b, *tokens, d = x.shape
    return Case(b, math.prod(tokens) if tokens else None, d, len(g))


def nbytes(case: Case, itemsize: int) -> int:
    """g is read and written, in fp32."""
    return case.B * (case.T or 1) * (case.D + case.E) * itemsize + 8 * case.D * case.E


def flops(case: Case) -> int:
    return 2 * case.B * (case.T or 1) * case.D * case.E
