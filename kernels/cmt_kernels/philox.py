"""Philox4x32-10: random numbers as a pure function of a counter and a key (Salmon et al., SC 2011).

The key is (seed, stage), the counter (block, sample, step, stream): a sample's noise depends on
nothing else, so batch splits, world size and restarts do not change it, and a GPU kernel can draw
the same numbers in place. Plain torch integers: the same bits on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Key(NamedTuple):
    """Names one stream of random numbers: seed, stage and step are integers, stream says what they are for."""

    seed: int
    stage: int
    step: int
    stream: int


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for b in [0, 2^32), without overflowing int64."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def integers(key: Key, sample: Tensor, blocks: int) -> Tensor:
    """Uniform 32-bit integers. sample: (B,) int64 row ids -> (B, blocks, 4) int64 in [0, 2^32)."""
    sample = sample.to(torch.int64)
    c0 = torch.arange(blocks, device=sample.device).expand(sample.shape[0], blocks)
    c1 = (sample & _MASK)[:, None].expand_as(c0)
    c2 = torch.full_like(c0, key.step & _MASK)
    c3 = torch.full_like(c0, key.stream & _MASK)
    k0, k1 = key.seed & _MASK, key.stage & _MASK
    for _ in range(10):
        h0, l0 = _multiply(_M0, c0)
        h1, l1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


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
