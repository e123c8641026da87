"""group_norm: mean 0 and variance 1 in each group of channels, then a weight and a bias a channel (Wu & He 2018).

r = 1/sqrt(var + eps),  xh = (x - mean) r,  y = w xh + b        xh. = r (x. - mean(x.) - xh mean(xh x.)),  y. = w xh.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def group_norm(x: Tensor | Dual, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor | Dual:
    """x: (B, C, H, W); weight, bias: (C,); groups divides C -> (B, C, H, W), in the dtype of x."""
    return backend("group_norm", x)(x, weight, bias, groups, eps)
