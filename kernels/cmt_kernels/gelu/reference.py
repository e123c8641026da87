"""gelu in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def gelu(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    x_v = value(x)
    if bias is not None:
        x_v = x_v + bias.to(x_v.dtype)
    y = F.gelu(x_v, approximate="tanh")
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, torch.ops.aten.gelu_backward(x.tangent, x_v[: len(x.tangent)], approximate="tanh"))
