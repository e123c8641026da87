"""conv2d: y = W * x + b with stride 1 and the size kept, y. = W * x. Weights are constants of the tangent."""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def conv2d(x: Tensor | Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor | Dual:
    """x: (B, C, H, W); weight: (E, C, n, n), n odd; bias: (E,) -> (B, E, H, W). Follows autocast as F.conv2d does."""
    return backend("conv2d", x)(x, weight, bias)
