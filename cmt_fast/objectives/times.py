"""Times of the linear path that flow matching and MeanFlow draw: a law on (0, 1), then a shift towards noise.

    t' = s t / (1 + (s - 1) t)

What m numbers say together survives noise sqrt(m) times stronger than what one says. So Esser et al. 2024 shift times by the
square root of the ratio of numbers, and RAE (Zheng et al. 2025) takes s = sqrt(m / 4096) for the m = 768 x 16 x 16 numbers of
its latents: 6.93. A network is told t', the time where its row is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cmt_fast.objectives.batch import LossContext

BASE = 4096  # numbers of a latent at which RAE shifts nothing


def dimension_shift(shape: tuple[int, ...]) -> float:
    """s of latents of this shape, as RAE has it: sqrt(numbers / 4096)."""
    return math.sqrt(math.prod(shape) / BASE)


def drawn(stream: int, sample: Tensor, config: Any, context: LossContext, dtype: torch.dtype) -> Tensor:
    """One time a row by the law of `config` (law, mean, std, shift). sample: (B,) -> (B,) in (0, 1)."""
    if config.law == "uniform":
        t = context.random.uniform(stream, sample)
    else:
        t = torch.sigmoid(config.mean + config.std * context.random.gauss(stream, sample))
    if config.shift != 1:
        t = config.shift * t / (1 + (config.shift - 1) * t)
    return t.to(dtype)
