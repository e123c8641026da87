"""conv2d in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels.dual import Dual, value


def conv2d(x: Tensor | Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor | Dual:
    around = weight.shape[-1] // 2
    y = F.conv2d(value(x), weight, bias, padding=around)
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        return Dual(y, F.conv2d(x.tangent, weight, padding=around))
