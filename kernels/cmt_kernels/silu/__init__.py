"""silu: y = x sigmoid(x), y. = sigmoid(x) (1 + x (1 - sigmoid(x))) x. (the adaLN conditioning)."""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def silu(x: Tensor | Dual) -> Tensor | Dual:
    """x: (...) -> (...), dtype of x."""
    return backend("silu", x)(x)
