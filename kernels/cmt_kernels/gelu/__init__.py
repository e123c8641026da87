"""gelu: tanh approximation, with the bias of the linear before it (Hendrycks & Gimpel 2016).

p = sqrt(2/pi) (x + .044715 x^3), s = tanh p,  y = .5 x (1 + s)
y' = .5 (1 + s) + .5 x (1 - s^2) sqrt(2/pi) (1 + 3 * .044715 x^2),  y. = y' x.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def gelu(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    """x: (..., D); bias: (D,) added first -> (..., D), dtype of x."""
    return backend("gelu", x)(x, bias)
