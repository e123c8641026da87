"""attention in plain torch: scaled_dot_product_attention for the value, explicit matrices for the tangent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, value


def attention(qkv: Tensor | Dual) -> Tensor | Dual:
    q, k, v = value(qkv).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d)
    o = F.scaled_dot_product_attention(q, k, v)
    y = o.transpose(1, 2).flatten(2)
    if not isinstance(qkv, Dual):
        return y
    with torch.no_grad():
        n = len(qkv.tangent)
        q, k, v, o = q[:n], k[:n], v[:n], o[:n]
        q_dot, k_dot, v_dot = qkv.tangent.permute(2, 0, 3, 1, 4).unbind(0)
        c = q.shape[-1] ** -0.5
        p = torch.softmax(c * (q @ k.transpose(-1, -2)), dim=-1)
        ps_dot = p * (c * (q_dot @ k.transpose(-1, -2) + q @ k_dot.transpose(-1, -2)))
        mu = ps_dot.sum(-1, keepdim=True)
        o_dot = ps_dot @ v + p @ v_dot - mu * o
        return Dual(y, o_dot.transpose(1, 2).flatten(2))
