"""time_embedding in plain torch."""

import math

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def time_embedding(t: Tensor | Dual, dim: int, max_frequency: float = 32.0) -> Tensor | Dual:
    t_v = value(t)
    dtype = torch.float64 if t_v.dtype == torch.float64 else torch.float32
    frequency = torch.logspace(
        math.log(0.25), math.log(max_frequency), dim // 2, base=math.e, dtype=torch.float64, device=t_v.device
    )
    angle = t_v.double()[:, None] * frequency  # of 1e5 radians fp32 keeps two digits, of 1e39 it is infinite
    cos, sin = angle.cos(), angle.sin()
    y = torch.cat((cos, sin), dim=-1).to(dtype)
    if not isinstance(t, Dual):
        return y
    with tangent_rule():
        n = len(t.tangent)
        rate = t.tangent.double()[:, None] * frequency
        return Dual(y, torch.cat((-rate * sin[:n], rate * cos[:n]), dim=-1).to(dtype))
