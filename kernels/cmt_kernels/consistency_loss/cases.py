"""Cases of consistency_loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw

DTYPES = LOW
GRADS = ("prediction",)


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    shape: tuple[int, ...]
    distance: str = "pseudo_huber"
    c: float = 0.01


CASES = tuple(Case(5, (3, 7, 11), distance) for distance in ("squared_l2", "l2", "pseudo_huber")) + (
    Case(5, (4, 8, 8), "pseudo_huber", 1.0),
    Case(1, (77,), "l2"),
)
BENCH = (Case(8, (4, 32, 32)), Case(8, (768, 16, 16)))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    prediction, target = (draw.normal(case.B, *case.shape) for _ in range(2))
    return {"prediction": prediction, "target": target, "distance": case.distance, "c": case.c}


def case_of(prediction, target, distance, c) -> Case:
    return Case(len(prediction), tuple(prediction.shape[1:]), distance, c)


def nbytes(case: Case, itemsize: int) -> int:
    return case.B * (2 * math.prod(case.shape) + 1) * itemsize


def flops(case: Case) -> int:
    return 3 * case.B * math.prod(case.shape)
