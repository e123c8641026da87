"""Cases of path_point."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw
from cmt_kernels.philox import Key

DTYPES = LOW
GRADS = ()


@dataclass(frozen=True)
class Case(BaseCase):
    """path: "edm" has alpha 1 and sigma t, "flow" has alpha 1 - t and sigma t."""

    B: int
    shape: tuple[int, ...]
    path: str = "flow"


CASES = (Case(5, (4, 8, 8)), Case(5, (3, 7, 11), "edm"), Case(1, (77,)), Case(9, (1,), "edm"))
BENCH = (Case(8, (4, 32, 32)), Case(8, (768, 16, 16)))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    t = draw.uniform(case.B, low=0.02, high=1.0)
    one = torch.ones_like(t)
    alpha, alpha_dot = (one, 0 * one) if case.path == "edm" else (1 - t, -one)
    return {
        "x_0": draw.normal(case.B, *case.shape),
        "alpha": alpha,
        "sigma": t,
        "alpha_dot": alpha_dot,
        "sigma_dot": one,
        "key": Key(seed=2**40 + 3, stage=1, step=50_000, stream=2),
        "sample": 1_000_000 + torch.arange(case.B, device=device),
    }


def case_of(x_0, alpha, sigma, alpha_dot, sigma_dot, key, sample) -> Case:
    return Case(len(x_0), tuple(x_0.shape[1:]))


def nbytes(case: Case, itemsize: int) -> int:
    return case.B * (3 * math.prod(case.shape) * itemsize + 4 * itemsize + 8)


def flops(case: Case) -> int:
    """Two axpys; the noise is integer work and is not counted."""
    return 6 * case.B * math.prod(case.shape)
