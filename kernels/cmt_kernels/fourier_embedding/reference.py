"""fourier_embedding in plain torch."""

import math

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def fourier_embedding(t: Tensor | Dual, frequency: Tensor, phase: Tensor | None = None) -> Tensor | Dual:
    dtype = torch.promote_types(value(t).dtype, torch.float32)
    w = frequency.to(dtype)
    angle = value(t).to(dtype)[:, None] * w
    if phase is not None:
        angle = angle + phase.to(dtype)
    cos, sin = angle.cos(), angle.sin()
    y = torch.cat((cos, sin), dim=-1) if phase is None else cos * math.sqrt(2)
    if not isinstance(t, Dual):
        return y
    with tangent_rule():
        n = len(t.tangent)
        rate = t.tangent.to(dtype)[:, None] * w
        y_dot = torch.cat((-rate * sin[:n], rate * cos[:n]), -1) if phase is None else rate * sin[:n] * -math.sqrt(2)
        return Dual(y, y_dot)
