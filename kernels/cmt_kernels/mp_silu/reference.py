"""mp_silu in plain torch."""

import torch
import torch.nn.functional as F

from cmt_kernels.dual import Dual, linear_map, multiply, tangent_rule, value


def mp_silu(x, scale=None, also_x=False):
    s = x
    if scale is not None:
        shape = *value(scale).shape, *[1] * (value(x).ndim - 2)
        s = multiply(x, linear_map(lambda m: m.view(-1, *shape[1:]), _one_plus(scale)))
    y = linear_map(lambda z: z / 0.596, _silu(s))
    return (y, x) if also_x else y


def _one_plus(scale):
    return scale._replace(value=scale.value + 1) if isinstance(scale, Dual) else scale + 1


def _silu(x):
    y = F.silu(value(x))
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, torch.ops.aten.silu_backward(x.tangent, x.value[: len(x.tangent)]))
