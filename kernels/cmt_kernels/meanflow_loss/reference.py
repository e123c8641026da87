"""meanflow_loss in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, value


def meanflow_loss(
    u: Tensor | Dual, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-2
) -> tuple[Tensor, Tensor]:
    u_v = value(u)
    with torch.no_grad():
        target = v.to(u_v.dtype)
        if isinstance(u, Dual):
            k = len(u.tangent)
            step = (t - r)[:k].to(u_v.dtype).view(-1, *[1] * (u_v.ndim - 1))
            target = torch.cat((target[:k] - step * u.tangent.to(u_v.dtype), target[k:]))
    squared = (u_v - target.detach()).square().flatten(1).sum(1)  # forward AD looks through no_grad, not through detach
    weight = (squared.detach() + c) ** -p
    return weight * squared, squared.detach()
