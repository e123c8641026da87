"""Checksums of flat fp32 tensors on their device: what a step's gradient and parameters are, in 64 bits, for a later look.

sum over i of bits(x_i) (C i + 1) modulo 2^64, with C even: every factor is odd, so any single flipped bit changes the sum, and
so does every exchange of two numbers that differ. Integers add up to the same in any order: ranks sum their own parts at
their places in the whole, and a run's sums do not depend on how its engine cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FACTOR = 0x1E3779B97F4A7C16  # even; a golden ratio's bits
PIECE = 1 << 22  # numbers at once: their 64-bit factors are on the device too


@torch.no_grad()
def partial(x: Tensor, first: int = 0) -> Tensor:
    """Of x (n,) fp32, whose first number is number `first` of the whole. (), int64, on its device."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for at in range(0, x.numel(), PIECE):
        bits = x[at : at + PIECE].detach().contiguous().view(torch.int32).to(torch.int64)
        place = torch.arange(first + at, first + at + bits.numel(), device=x.device)
        total += (bits * (place * FACTOR + 1)).sum()
    return total


def of_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Of tensors as if they were one after the other. (), int64."""
    first, total = 0, torch.zeros((), dtype=torch.int64)
    for x in tensors:
        total += partial(x.reshape(-1).float(), first).cpu()
        first += x.numel()
    return total


def text(total: Tensor | int) -> str:
    """16 hexadecimal digits."""
    return f"{int(total) & (1 << 64) - 1:016x}"
