"""qk_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value
from cmt_kernels.magnitude import size_of


def qk_norm(
    qkv: Tensor | Dual,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | Dual:
    if q_weight is None and cos is None:
        return qkv
    qkv_v = value(qkv)
    weight = None if q_weight is None else torch.stack((q_weight, k_weight))[:, None]  # (2, 1, d)
    qk, v = qkv_v[:, :, :2], qkv_v[:, :, 2:]
    y = qk
    if weight is not None:
        size = size_of(qk, -1)
        qk = qk * size
        r = _rms(qk, eps, size)
        y = qk * r * weight.to(qk.dtype)
    y = torch.cat((_rotate(y, cos, sin), v), dim=2)
    if not isinstance(qkv, Dual):
        return y
    with tangent_rule():
        n = len(qkv.tangent)
        qk_dot, v_dot = qkv.tangent[:, :, :2], qkv.tangent[:, :, 2:]
        if weight is not None:
            xh = qk[:n] * r[:n]
            qk_dot = weight.to(qk.dtype) * r[:n] * size[:n] * (qk_dot - xh * (xh * qk_dot).mean(-1, keepdim=True))
        return Dual(y, torch.cat((_rotate(qk_dot, cos, sin), v_dot), dim=2))


def _rms(x: Tensor, eps: float, size: Tensor) -> Tensor:
    """1 / rms of x, which has been taken at this size."""
    wide, size = (x, size) if x.dtype == torch.float64 else (x.float(), size.float())
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps * size * size).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return x
    cos, sin = (f[:, None, None].to(x.dtype) for f in (cos, sin))  # (T, 1, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
