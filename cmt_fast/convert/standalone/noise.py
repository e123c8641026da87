"""Noise and labels of samples as functions of a seed and their index, as the trainer has them; what arguments are checked by.

In an exported folder they stand in pipeline.py, in the place of the line that imports them: diffusers fetches one file.
"""

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

START, AGAIN = 8, 9  # what random numbers are for: the noise that sampling starts from, and that of later steps


def philox(seed: int, step: int, stream: int, sample: Tensor, blocks: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): sample (B,) int64 -> (B, blocks, 4) int64 in [0, 2^32), the same on every device."""
    mask = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        low = (b & 0xFFFF) * a  # nothing passes 2^63
        high = (b >> 16) * a + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    c0 = torch.arange(blocks, device=sample.device).expand(len(sample), blocks)
    c1 = (sample & mask)[:, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, step & mask), torch.full_like(c0, stream & mask)
    k0, k1 = seed & mask, 0
    for _ in range(10):
        h0, l0 = multiply(0xD2511F53, c0)
        h1, l1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def seeded_normal(seed: int, step: int, stream: int, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape) float32 by Box-Muller, each a function of the arguments alone."""
    n = math.prod(shape)
    bits = philox(seed, step, stream, sample, -(-n // 4)).to(torch.float32)
    radius = torch.sqrt(-2.0 * torch.log((bits[..., 0::2] + 0.5) * 2.0**-32))
    angle = bits[..., 1::2] * (2.0 * math.pi * 2.0**-32)
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.flatten(1)[:, :n].reshape(len(sample), *shape)


def proportional_labels(counts: list[int], n: int) -> list[int]:
    """The first n classes of a sequence in which every class has its share of every beginning, rounded down or up.

    Class k of share p has its j-th sample in the window [floor(j / p), ceil((j + 1) / p)); of the open windows the one that
    closes first is served. Equal shares go round the classes in order.
    """
    total, made, out = sum(counts), [0] * len(counts), []
    present = [k for k, count in enumerate(counts) if count]
    for index in range(n):
        waiting = [k for k in present if made[k] * total // counts[k] <= index]
        out.append(min(waiting, key=lambda k: -(-(made[k] + 1) * total // counts[k])))
        made[out[-1]] += 1
    return out


def number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """A whole number, numpy's and torch's too. Raises ValueError, naming the argument."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        end = "on" if most == math.inf else f"to {most}"
        raise ValueError(f"{name}: {value!r} is not among the whole numbers from {least} {end}")
    return number


def column(c: Tensor, x: Tensor) -> Tensor:
    """c: (B,) -> (B, 1, ...), to multiply x (B, ...)."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
