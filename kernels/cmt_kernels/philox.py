"""Philox4x32-10: random numbers as a pure function of a counter and a key (Salmon et al., SC 2011).

The key is (seed, stage), the counter (block, sample, step, stream): a sample's noise depends on
nothing else, so batch splits, world size and restarts do not change it, and a GPU kernel can draw
the same numbers in place. The integers are an op, `random_bits`, with the same bits on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_kernels.random_bits import random_bits


class Key(NamedTuple):
    """Names one stream of random numbers: seed, stage and step are integers, stream says what they are for."""

    seed: int
    stage: int
    step: int
    stream: int


def integers(key: Key, sample: Tensor, blocks: int) -> Tensor:
    """Uniform 32-bit integers. sample: (B,) int64 row ids -> (B, blocks, 4) int64 in [0, 2^32)."""
    return random_bits(key, sample, blocks)


def uniform(key: Key, sample: Tensor, n: int) -> Tensor:
    """Uniform numbers in (0, 1), float64. sample: (B,) -> (B, n)."""
    bits = integers(key, sample, -(-n // 4)).flatten(1)[:, :n]
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def normal(key: Key, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32, by Box-Muller. sample: (B,) -> (B, *shape)."""
    n = math.prod(shape)
    bits = integers(key, sample, -(-n // 4)).to(torch.float32)
    radius = torch.sqrt(-2.0 * torch.log((bits[..., 0::2] + 0.5) * 2.0**-32))
    angle = bits[..., 1::2] * (2.0 * math.pi * 2.0**-32)
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.flatten(1)[:, :n].reshape(sample.shape[0], *shape)
