"""Cases of label_embedding."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw

DTYPES = LOW
GRADS = ("table",)


@dataclass(frozen=True)
class Case(BaseCase):
    """C classes; the null class comes on top."""

    B: int
    D: int
    C: int
    drop: bool = False


CASES = (Case(5, 72, 10), Case(5, 72, 10, True), Case(1, 7, 1, True), Case(33, 24, 3, True))
BENCH = (Case(8, 768, 1000), Case(8, 768, 1000, True))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    return {
        "labels": draw.integers(case.B, high=case.C + 1),
        "table": draw.normal(case.C + 1, case.D),
        "drop": draw.integers(case.B, high=2).bool() if case.drop else None,
    }


def case_of(labels, table, drop) -> Case:
    return Case(len(labels), table.shape[1], len(table) - 1, drop is not None)


def nbytes(case: Case, itemsize: int) -> int:
    return case.B * (8 + case.drop + 2 * case.D * itemsize)


def flops(case: Case) -> int:
    return 0
