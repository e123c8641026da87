"""linear: y = x W^T + b, y. = x. W^T. Weights are constants of the tangent; biases drop out of it.

Two matmuls, not one over both: `python -m bench calibrate packed` measures what one would save (bench/results/cpu/packed.json).
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def linear(x: Tensor | Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor | Dual:
    """x: (..., D); weight: (E, D); bias: (E,) -> (..., E). Follows autocast as F.linear does."""
    return backend("linear", x)(x, weight, bias)
