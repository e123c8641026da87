"""modulated_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, head, rows, tangent, value


def modulated_norm(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6) -> Tensor | Dual:
    k = rows(x, shift, scale)
    x_v, shift_v, scale_v = value(x), value(shift), value(scale)
    xh, _, r = torch.native_layer_norm(x_v, x_v.shape[-1:], None, None, eps)  # F.layer_norm, but it keeps r
    y = torch.addcmul(shift_v.unsqueeze(1).to(xh.dtype), xh, (1 + scale_v).unsqueeze(1).to(xh.dtype))
    if k is None:
        return y
    with torch.no_grad():
        xh = xh[:k].detach()
        y_dot = torch.zeros_like(xh)
        x_dot, shift_dot, scale_dot = tangent(x), tangent(shift), tangent(scale)
        if x_dot is not None:
            r = r[:k].detach().to(xh.dtype)
            xh_dot = r * (x_dot - x_dot.mean(-1, keepdim=True) - xh * (xh * x_dot).mean(-1, keepdim=True))
            y_dot = xh_dot * (1 + head(scale, k)).unsqueeze(1)
        if scale_dot is not None:
            y_dot = torch.addcmul(y_dot, xh, scale_dot.unsqueeze(1).to(xh.dtype))
        if shift_dot is not None:
            y_dot = y_dot + shift_dot.unsqueeze(1)
        return Dual(y, y_dot.to(y.dtype))
