"""fourier_embedding in plain torch."""

import math

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def fourier_embedding(t: Tensor | Dual, frequency: Tensor, phase: Tensor | None = None) -> Tensor | Dual:
    dtype = torch.promote_types(value(t).dtype, torch.float32)
    w = frequency.double()
    angle = value(t).double()[:, None] * w  # of 1e5 radians fp32 keeps two digits, of 1e39 it is infinite
    if phase is not None:
        angle = angle + phase.double()
    cos, sin = angle.cos(), angle.sin()
    y = (torch.cat((cos, sin), dim=-1) if phase is None else cos * math.sqrt(2)).to(dtype)
    if not isinstance(t, Dual):
        return y
    with tangent_rule():
        n = len(t.tangent)
        rate = t.tangent.double()[:, None] * w
        y_dot = torch.cat((-rate * sin[:n], rate * cos[:n]), -1) if phase is None else rate * sin[:n] * -math.sqrt(2)
        return Dual(y, y_dot.to(dtype))
