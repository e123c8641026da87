"""silu in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def silu(x: Tensor | Dual) -> Tensor | Dual:
    y = F.silu(value(x))
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, torch.ops.aten.silu_backward(x.tangent, x.value[: len(x.tangent)]))
