"""conv2d in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def conv2d(x: Tensor | Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor | Dual:
    around = weight.shape[-1] // 2
    y = F.conv2d(value(x), weight, bias, padding=around)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, F.conv2d(x.tangent, weight, padding=around))
