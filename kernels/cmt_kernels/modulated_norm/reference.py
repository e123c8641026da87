"""modulated_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.dual import Dual, head, in_dtype, linear_map, rows, tangent, tangent_rule, value


def modulated_norm(x, shift, scale, eps=1e-6, also_x=False):
    y = _norm(x, shift, scale, eps)
    return (y, x) if also_x else y


def _norm(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float) -> Tensor | Dual:
    k, dtype = rows(x, shift, scale), value(shift).dtype
    wide = torch.promote_types(value(x).dtype, dtype)  # shift in bf16 beside a stream in fp32: rounded at the end, once
    x, shift, scale = (in_dtype(m, wide) for m in (x, shift, scale))
    y = _modulated(x, shift, scale, eps, k)
    return y if wide == dtype else linear_map(lambda m: m.to(dtype), y)


def _modulated(
    x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float, k: int | None
) -> Tensor | Dual:
    """All in one dtype."""
    x_v, shift_v, scale_v = value(x), value(shift), value(scale)
    if transforms.derivative() and k is None:
        xh = _normalised(x_v, eps)
    else:  # F.layer_norm, but it keeps mean and r
        xh, mean, r = torch.native_layer_norm(x_v, x_v.shape[-1:], None, None, eps)
    y = torch.addcmul(shift_v.unsqueeze(1), xh, (1 + scale_v).unsqueeze(1))
    if k is None:
        return y
    with tangent_rule():
        x_dot, shift_dot, scale_dot = tangent(x), tangent(shift), tangent(scale)
        y_dot = torch.zeros_like(y[:k]) if shift_dot is None else shift_dot.unsqueeze(1)
        if x_dot is not None:  # the Jacobian of a norm is symmetric: its tangent is its backward, in one kernel
            xh_dot, _, _ = torch.ops.aten.native_layer_norm_backward(
                x_dot,
                head(x, k),
                x_v.shape[-1:],
                mean[:k].detach(),
                r[:k].detach(),
                None,
                None,
                [True, False, False],
            )
            y_dot = torch.addcmul(y_dot, xh_dot, (1 + head(scale, k)).unsqueeze(1))
        if scale_dot is not None:
            y_dot = torch.addcmul(y_dot, xh[:k].detach(), scale_dot.unsqueeze(1))
        return Dual(y, y_dot.expand_as(y[:k]))


def _normalised(x: Tensor, eps: float) -> Tensor:
    """xh by its formula. In a derivative of a derivative torch's own norm takes the mean and 1/std for constants."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
