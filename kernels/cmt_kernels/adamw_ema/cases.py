"""Cases of adamw_ema."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import BaseCase, Draw

DTYPES = (torch.float32,)
GRADS = ()
MUTATED = ("p", "m", "v", "emas", "half")
SCRATCH = ("g",)


@dataclass(frozen=True)
class Case(BaseCase):
    P: int
    emas: int = 1
    step: int = 1000
    clip: float = 0.0
    decay: float = 0.0
    half: bool = False


CASES = (
    Case(72),
    Case(1001, 0, 1),
    Case(1001, 2, 3, 1.0),
    Case(1001, 1, 100, 0.0, 0.1),
    Case(1001, 3, 5, 1.0, 0.01),
    Case(77, 1, 2, 1e6),
    Case(1001, 1, 7, 1.0, 0.01, True),
)
BENCH = (Case(2**22, 1), Case(2**22, 1, 1000, 1.0, 0.01), Case(2**22, 2, 1000, 1.0, 0.01))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    p = draw.normal(case.P)
    return {
        "p": p,
        "g": draw.normal(case.P),
        "m": draw.normal(case.P, std=0.3),
        "v": draw.uniform(case.P, low=0.01),
        "emas": [p + draw.normal(case.P, std=0.1) for _ in range(case.emas)],
        "ema_betas": [0.9, 0.999, 0.9999][: case.emas],
        "step": case.step,
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": case.decay,
        "max_norm": case.clip,
        "half": torch.empty_like(p, dtype=torch.bfloat16) if case.half else None,
    }


def case_of(p, g, m, v, emas, ema_betas, step, lr, betas, eps, weight_decay, max_norm, half) -> Case:
    return Case(p.numel(), len(emas), step, max_norm, weight_decay, half is not None)


def nbytes(case: Case, itemsize: int) -> int:
    """p, m, v and each track are read and written, g is read for its norm and again for the step."""
    return ((8 + 2 * case.emas) * itemsize + 2 * case.half) * case.P


def flops(case: Case) -> int:
    return (2 + 15 + 3 * case.emas) * case.P
