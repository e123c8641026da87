"""Cases of gated_residual."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "branch", "gate", "bias")


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    D: int
    bias: bool = True
    k: int | None = None
    stream: bool = False  # x in fp32 at least, whatever the dtype of the others


CASES = tuple(Case(8, 5, 24, True, k) for k in tangent_rows(8)) + (
    Case(5, 77, 72, False),
    Case(5, 77, 72, False, 1),
    Case(5, 77, 72, True, 5),
    *(Case(5, 77, 72, True, k, stream=True) for k in (None, 2)),
)
BENCH = tuple(Case(8, 256, 768, True, k) for k in (None, 2, 8)) + tuple(
    Case(8, 256, 768, True, k, True) for k in (None, 2)
)


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw, stream = (
        Draw(dtype, device),
        Draw(torch.promote_types(dtype, torch.float32) if case.stream else dtype, device, seed=11),
    )
    return {
        "x": stream.dual(case.k, case.B, case.T, case.D),
        "branch": draw.dual(case.k, case.B, case.T, case.D),
        "gate": draw.dual(case.k, case.B, case.D, std=0.5),
        "bias": draw.normal(case.D) if case.bias else None,
    }


def case_of(x, branch, gate, bias) -> Case:
    b, t, d = value(x).shape
    return Case(b, t, d, bias is not None, rows(x, branch, gate), value(x).dtype != value(branch).dtype)


def nbytes(case: Case, itemsize: int) -> int:
    x = 4 if case.stream else itemsize
    return ((case.B + (case.k or 0)) * (case.T * (2 * x + itemsize) + itemsize) + case.bias * itemsize) * case.D


def flops(case: Case) -> int:
    return ((2 + case.bias) * case.B + 4 * (case.k or 0)) * case.T * case.D
