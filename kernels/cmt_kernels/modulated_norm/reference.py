"""modulated_norm in plain torch."""
import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, head, rows, tangent, value


def modulated_norm(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6) -> Tensor | Dual:
    k = rows(x, shift, scale)
    x_v, shift_v, scale_v = value(x), value(shift), value(scale)
    xh = F.layer_norm(x_v, x_v.shape[-1:], eps=eps)
    y = torch.addcmul(shift_v.unsqueeze(1).to(xh.dtype), xh, (1 + scale_v).unsqueeze(1).to(xh.dtype))
    if k is None:
        return y
    with torch.no_grad():
        xh = xh[:k].detach()
        y_dot = torch.zeros_like(xh)
        x_dot, shift_dot, scale_dot = tangent(x), tangent(shift), tangent(scale)
        if x_dot is not None:
            r = torch.rsqrt(head(x, k).float().var(-1, correction=0, keepdim=True) + eps) if x_v.dtype != torch.float64 \
                else torch.rsqrt(head(x, k).var(-1, correction=0, keepdim=True) + eps)
            xh_dot = r.to(xh.dtype) * (x_dot - x_dot.mean(-1, keepdim=True) - xh * (xh * x_dot).mean(-1, keepdim=True))
            y_dot = xh_dot * (1 + head(scale, k)).unsqueeze(1)
        if scale_dot is not None:
            y_dot = torch.addcmul(y_dot, xh, scale_dot.unsqueeze(1).to(xh.dtype))
        if shift_dot is not None:
            y_dot = y_dot + shift_dot.unsqueeze(1)
        return Dual(y, y_dot.to(y.dtype))
