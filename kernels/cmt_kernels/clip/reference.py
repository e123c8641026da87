"""clip in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def clip(x: Tensor | Dual, limit: float) -> Tensor | Dual:
    y = value(x).clamp(-limit, limit)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, torch.where(x.value[: len(x.tangent)].abs() <= limit, x.tangent, 0))
