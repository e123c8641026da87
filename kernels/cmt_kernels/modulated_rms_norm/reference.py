"""modulated_rms_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, in_dtype, linear_map, rows, tangent, tangent_rule, value
from cmt_kernels.magnitude import size_of


def modulated_rms_norm(
    x: Tensor | Dual, weight: Tensor, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6
) -> Tensor | Dual:
    k, dtype = rows(x, shift, scale), value(shift).dtype
    common = torch.promote_types(
        value(x).dtype, dtype
    )  # shift in bf16 beside a stream in fp32: rounded at the end, once
    x, shift, scale = (in_dtype(m, common) for m in (x, shift, scale))
    y = _modulated(x, weight, shift, scale, eps, k)
    return y if common == dtype else linear_map(lambda m: m.to(dtype), y)


def _modulated(
    x: Tensor | Dual, weight: Tensor, shift: Tensor | Dual, scale: Tensor | Dual, eps: float, k: int | None
) -> Tensor | Dual:
    """x, shift and scale in one dtype."""
    x_v = value(x)
    wide = x_v.to(torch.promote_types(x_v.dtype, torch.float32))
    size = size_of(wide, -1)
    wide = wide * size
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps * size * size)
    xh, w = (wide * r).to(x_v.dtype), weight.to(x_v.dtype)
    factor = (1 + value(scale)).unsqueeze(1).to(x_v.dtype)
    y = torch.addcmul(value(shift).unsqueeze(1).to(x_v.dtype), xh * w, factor)
    if k is None:
        return y
    with tangent_rule():
        x_dot, shift_dot, scale_dot = tangent(x), tangent(shift), tangent(scale)
        y_dot = torch.zeros_like(y[:k]) if shift_dot is None else shift_dot.unsqueeze(1).to(y.dtype)
        if x_dot is not None:
            wide_xh = wide[:k] * r[:k]
            xh_dot = r[:k] * size[:k] * (x_dot - wide_xh * (wide_xh * x_dot).mean(-1, keepdim=True))
            y_dot = torch.addcmul(y_dot, xh_dot.to(y.dtype) * w, factor[:k])
        if scale_dot is not None:
            y_dot = torch.addcmul(y_dot, xh[:k].detach() * w, scale_dot.unsqueeze(1).to(y.dtype))
        return Dual(y, y_dot.expand_as(y[:k]))
