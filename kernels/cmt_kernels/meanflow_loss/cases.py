"""Cases of meanflow_loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows

DTYPES = LOW
GRADS = ("u",)


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    shape: tuple[int, ...]
    p: float = 1.0
    k: int | None = None


CASES = tuple(Case(8, (4, 3, 3), 1.0, k) for k in tangent_rows(8)) + (
    Case(5, (3, 7, 11), 0.5, 1),
    Case(5, (77,), 0.0, 5),
    Case(5, (3, 7, 11), 0.75),
)
BENCH = tuple(Case(8, (4, 32, 32), 1.0, k) for k in (None, 2, 8)) + (Case(8, (768, 16, 16), 1.0, 2),)


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """r < t in the rows with a tangent, r = t in the others."""
    draw = Draw(dtype, device)
    t, fraction = draw.uniform(case.B, low=0.1), draw.uniform(case.B)
    fraction[case.k or 0 :] = 1
    return {
        "u": draw.dual(case.k, case.B, *case.shape),
        "v": draw.normal(case.B, *case.shape),
        "t": t,
        "r": t * fraction,
        "p": case.p,
        "c": 1e-2,
    }


def case_of(u, v, t, r, p, c) -> Case:
    return Case(len(v), tuple(v.shape[1:]), p, rows(u))


def nbytes(case: Case, itemsize: int) -> int:
    return ((2 * case.B + (case.k or 0)) * math.prod(case.shape) + 4 * case.B) * itemsize


def flops(case: Case) -> int:
    return (3 * case.B + 2 * (case.k or 0)) * math.prod(case.shape)
