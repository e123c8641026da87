"""Cases of unit_weight."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import BaseCase, Draw

DTYPES = (torch.float32,)
GRADS = ("weight",)


@dataclass(frozen=True)
class Case(BaseCase):
    """E rows of D kernels of n x n; n = 0: of a linear layer."""

    E: int
    D: int
    n: int = 3
    last: bool = False


CASES = (Case(12, 10, 3), Case(12, 10, 3, True), Case(5, 77, 1, True), Case(9, 300, 3, True), Case(5, 77, 0))
BENCH = (Case(384, 384, 3, True), Case(768, 768, 3, True), Case(768, 768, 0))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    shape = (case.E, case.D, case.n, case.n)[: 4 if case.n else 2]
    weight = Draw(dtype, device).normal(*shape, std=1.5)
    return {"weight": weight, "gain": weight[0].numel() ** -0.5, "channels_last": case.last}


def case_of(weight, gain, channels_last, dtype, eps) -> Case:
    e, d, *sizes = weight.shape
    return Case(e, d, sizes[0] if sizes else 0, channels_last)


def nbytes(case: Case, itemsize: int) -> int:
    return 2 * case.E * case.D * max(case.n**2, 1) * itemsize


def flops(case: Case) -> int:
    """A square, a sum, a product of the gain and a division."""
    return 4 * case.E * case.D * max(case.n**2, 1)
