"""Cases of mp_cat."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("a", "b")


@dataclass(frozen=True)
class Case(BaseCase):
    """T: pixels of an image, in a column; D, E: channels of a and of b."""

    B: int
    T: int
    D: int
    E: int
    k: int | None = None


CASES = tuple(Case(8, 5, 24, 16, k) for k in tangent_rows(8)) + (Case(5, 7, 77, 3), Case(5, 7, 3, 77, 1))
BENCH = tuple(Case(8, 4096, 192, 192, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {name: draw.dual(case.k, case.B, d, case.T, 1, std=2.0) for name, d in (("a", case.D), ("b", case.E))}


def case_of(a, b) -> Case:
    n, d, *_ = value(a).shape
    return Case(n, value(a)[:1, :1].numel(), d, value(b).shape[1], rows(a, b))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * (case.B + (case.k or 0)) * case.T * (case.D + case.E) * itemsize


def flops(case: Case) -> int:
    return (case.B + (case.k or 0)) * case.T * (case.D + case.E)
