"""group_norm in plain torch."""

import torch
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.dual import Dual, linear_map, tangent_rule, value


def group_norm(x: Tensor | Dual, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor | Dual:
    if value(x).dtype in (torch.bfloat16, torch.float16):  # its mean and 1/std would be kept in that dtype too
        y = group_norm(
            x._replace(value=x.value.float()) if isinstance(x, Dual) else x.float(), weight, bias, groups, eps
        )
        return linear_map(lambda y: y.to(value(x).dtype), y)
    x_v = value(x).contiguous()
    b, c, pixels = x_v.shape[0], x_v.shape[1], x_v[0, 0].numel()
    weight, bias = weight.to(x_v.dtype).contiguous(), bias.to(x_v.dtype).contiguous()  # its kernel reads no strides
    if transforms.derivative() and not isinstance(x, Dual):  # torch.compile does not trace torch's own norm under jvp
        return _normalised(x_v, groups, eps) * weight[:, None, None] + bias[:, None, None]
    y, mean, r = torch.native_group_norm(
        x_v, weight, bias, b, c, pixels, groups, eps
    )  # F.group_norm keeps no mean and r
    if not isinstance(x, Dual):
        return y
    with tangent_rule():  # the Jacobian of a norm is symmetric: its tangent is its backward, in one kernel
        k = len(x.tangent)
        if k == 0:
            return Dual(y, torch.zeros_like(y[:0]))
        xh_dot, _, _ = torch.ops.aten.native_group_norm_backward(
            x.tangent.to(x_v.dtype).contiguous(),
            x_v[:k],
            mean[:k],
            r[:k],
            None,
            k,
            c,
            pixels,
            groups,
            [True, False, False],
        )
        return Dual(y, xh_dot * weight[:, None, None])


def _normalised(x: Tensor, groups: int, eps: float) -> Tensor:
    """xh by its formula."""
    parts = x.unflatten(1, (groups, -1))
    centred = parts - parts.mean((2, 3, 4), keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean((2, 3, 4), keepdim=True) + eps)).flatten(1, 2)
