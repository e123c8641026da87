"""meanflow_loss in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, value
from cmt_kernels.magnitude import size_of


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
    difference = (u_v - target.detach()).flatten(1)  # forward AD looks through no_grad, not through detach
    if p == 0:
        squared = difference.square().sum(1)
        return squared, squared.detach()
    size = size_of(difference, 1)
    squared = (difference * size).square().sum(1)  # of the difference at that size
    size = size.squeeze(1)
    weight = (squared.detach() + c * size * size) ** -p * size ** (2 * p - 2)
    return weight * squared, squared.detach() / size / size
