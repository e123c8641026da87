"""Cases of pixel_norm."""

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
    dim: int = 1
    k: int | None = None


CASES = tuple(Case(8, (6, 3, 3), 1, k) for k in tangent_rows(8)) + (
    Case(5, (77, 3, 2, 8), -1),
    Case(5, (7, 3, 2, 8), -1, 2),
)
BENCH = tuple(Case(8, (256, 32, 32), 1, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return {"x": Draw(dtype, device).dual(case.k, case.B, *case.shape, std=2.0), "dim": case.dim}


def case_of(x, dim, eps) -> Case:
    return Case(len(value(x)), tuple(value(x).shape[1:]), dim, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * (case.B + (case.k or 0)) * prod(case.shape) * itemsize


def flops(case: Case) -> int:
    """A square, a sum and a division an element; the tangent has a product, a sum, a product, a difference, a division."""
    return (3 * case.B + 5 * (case.k or 0)) * prod(case.shape)
