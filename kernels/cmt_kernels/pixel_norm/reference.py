"""pixel_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value
from cmt_kernels.magnitude import size_of


def pixel_norm(x: Tensor | Dual, dim: int = 1, eps: float = 1e-4) -> Tensor | Dual:
    size = size_of(value(x), dim)  # x and its length are taken at this size
    x_v = value(x) * size
    wide = torch.promote_types(x_v.dtype, torch.float32)
    scale = x_v.shape[dim] ** -0.5
    length = torch.linalg.vector_norm(x_v, dim=dim, keepdim=True, dtype=wide)
    n = length * scale + eps * size
    y = x_v / n.to(x_v.dtype)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        k = len(x.tangent)
        x_v, x_dot, n, length = x_v[:k].to(wide), x.tangent.to(wide), n[:k], length[:k]
        n_dot = (x_v * x_dot).sum(dim, keepdim=True) * scale / length
        n_dot = n_dot.masked_fill(~(length > 0), 0)  # the gradient of a length at 0 is taken as 0
        return Dual(y, ((x_dot - x_v / n * n_dot) / n * size[:k]).to(y.dtype))
