"""Cases of dropout."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x",)


@dataclass(frozen=True)
class Case(BaseCase):
    """shape: of a row."""

    B: int
    shape: tuple[int, ...]
    p: float = 0.25
    k: int | None = None


CASES = tuple(Case(8, (3, 4, 4), 0.25, k) for k in tangent_rows(8)) + (Case(5, (77,), 0.1), Case(5, (7, 11), 0.9, 2))
BENCH = tuple(Case(8, (256, 32, 32), 0.1, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "x": draw.dual(case.k, case.B, *case.shape),
        "seeds": draw.integers(case.B, 2, high=2**32),
        "p": case.p,
    }


def case_of(x, seeds, p) -> Case:
    return Case(len(value(x)), tuple(value(x).shape[1:]), p, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * (case.B + (case.k or 0)) * prod(case.shape) * itemsize + 16 * case.B


def flops(case: Case) -> int:
    """Ten integer operations and a product an element; the tangent has the product."""
    return (11 * case.B + (case.k or 0)) * prod(case.shape)
