"""dropout in plain torch: integers of 64 bits whose products stay below 2^63, the same on every device."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value

_MASK = 0xFFFFFFFF


def dropout(x: Tensor | Dual, seeds: Tensor, p: float) -> Tensor | Dual:
    x_v = value(x)
    h = torch.arange(x_v[0].numel(), device=x_v.device) ^ seeds[:, :1]
    h = (h ^ (h >> 16)) * 0x7FEB352D & _MASK
    h = h ^ seeds[:, 1:]
    h = (h ^ (h >> 16)) * 0x045D9F3B & _MASK
    dropped = ((h ^ (h >> 16)) < p * 2.0**32).view(x_v.shape)
    y = (x_v / (1 - p)).masked_fill(dropped, 0)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, (x.tangent / (1 - p)).masked_fill(dropped[: len(x.tangent)], 0))
