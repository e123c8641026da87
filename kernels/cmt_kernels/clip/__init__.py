"""clip: y = min(max(x, -limit), limit), y. = x. where |x| <= limit, else 0."""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def clip(x: Tensor | Dual, limit: float) -> Tensor | Dual:
    """x: (B, ...); limit > 0 -> the same shape and dtype."""
    return backend("clip", x)(x, limit)
