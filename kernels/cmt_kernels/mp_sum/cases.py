"""Cases of mp_sum."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value
from cmt_kernels.mp_sum.reference import weights

DTYPES = LOW
GRADS = ("a", "b")


@dataclass(frozen=True)
class Case(BaseCase):
    """shape: of a row."""

    B: int
    shape: tuple[int, ...]
    share: float = 0.3
    limit: float | None = None
    k: int | None = None


CASES = tuple(Case(8, (24, 3, 5), 0.3, 1.5, k) for k in tangent_rows(8)) + (
    Case(5, (77, 7), 0.5),
    Case(5, (77, 7), 0.5, None, 1),
)
BENCH = tuple(Case(8, (192, 64, 64), 0.3, 256.0, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """No sum is so near to the limit that rounding moves it to the other side, where it has another tangent and gradient."""
    draw = Draw(dtype, device)
    a, b = (draw.dual(case.k, case.B, *case.shape, std=2.0) for _ in range(2))
    if case.limit is not None:
        w_a, w_b = weights(case.share)
        s = w_a * value(a).double() + w_b * value(b).double()
        near = (s.abs() / case.limit - 1).abs() < 0.03
        for x in (a, b):
            value(x).masked_fill_(near, 0)
    return {"a": a, "b": b, "share": case.share, "limit": case.limit}


def case_of(a, b, share, limit) -> Case:
    return Case(len(value(a)), tuple(value(a).shape[1:]), share, limit, rows(a, b))


def nbytes(case: Case, itemsize: int) -> int:
    return 3 * (case.B + (case.k or 0)) * prod(case.shape) * itemsize


def flops(case: Case) -> int:
    return (3 + 2 * (case.limit is not None)) * (case.B + (case.k or 0)) * prod(case.shape)
