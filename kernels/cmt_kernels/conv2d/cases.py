"""Cases of conv2d."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("x", "weight", "bias")


@dataclass(frozen=True)
class Case(BaseCase):
    """Images of side S, kernels of side n."""

    B: int
    C: int
    S: int
    E: int
    n: int = 3
    bias: bool = True
    k: int | None = None


CASES = tuple(Case(8, 3, 4, 5, 3, True, k) for k in tangent_rows(8)) + (
    Case(3, 7, 5, 4, 1, False),
    Case(3, 7, 5, 4, 1, False, 2),
)
BENCH = tuple(Case(8, 256, 32, 256, 3, False, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "x": draw.dual(case.k, case.B, case.C, case.S, case.S),
        "weight": draw.normal(case.E, case.C, case.n, case.n, std=(case.C * case.n**2) ** -0.5),
        "bias": draw.normal(case.E) if case.bias else None,
    }


def case_of(x, weight, bias) -> Case:
    """Of square images."""
    b, c, s, _ = value(x).shape
    return Case(b, c, s, weight.shape[0], weight.shape[-1], bias is not None, rows(x))


def nbytes(case: Case, itemsize: int) -> int:
    activations = (case.B + (case.k or 0)) * case.S**2 * (case.C + case.E)
    return (activations + case.E * case.C * case.n**2 + case.bias * case.E) * itemsize


def flops(case: Case) -> int:
    return 2 * (case.B + (case.k or 0)) * case.S**2 * case.C * case.E * case.n**2
