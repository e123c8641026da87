"""Cases of random_bits."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import BaseCase

DTYPES = (torch.float32,)  # of nothing: the ids are int64 and so is what comes of them
GRADS = ()


@dataclass(frozen=True)
class Case(BaseCase):
    """seed: beyond 32 bits its low ones count."""

    B: int
    blocks: int
    seed: int = 7


CASES = (Case(5, 1), Case(1, 77), Case(9, 16, 2**40 + 3), Case(3, 33, -1), Case(64, 2))
BENCH = (Case(64, 1), Case(64, 16), Case(64, 1024))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    sample = 2**32 - 3 + 1_000_003 * torch.arange(case.B, device=device)
    return {"key": (case.seed, 3, 2**31 + 50_000, 2), "sample": sample, "blocks": case.blocks}


def case_of(key, sample, blocks) -> Case:
    return Case(len(sample), blocks, key[0])


def nbytes(case: Case, itemsize: int) -> int:
    return 8 * case.B * (1 + 4 * case.blocks)


def flops(case: Case) -> int:
    """Integer work is not counted."""
    return 0
