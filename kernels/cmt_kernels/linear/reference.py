"""linear in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def linear(x: Tensor | Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor | Dual:
    y = F.linear(value(x), weight, bias)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, F.linear(x.tangent, weight))
