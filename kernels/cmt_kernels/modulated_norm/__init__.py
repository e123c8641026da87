"""modulated_norm: LayerNorm without affine, then adaLN scale and shift (Peebles & Xie 2023, DiT).

r = 1/sqrt(var + eps),  xh = (x - mean) r,  y = xh (1 + scale) + shift          (over the last dim)
xh. = r (x. - mean(x.) - xh mean(xh x.))
y.  = xh. (1 + scale) + xh scale. + shift.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def modulated_norm(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6) -> Tensor | Dual:
    """x: (B, T, D); shift, scale: (B, D) -> (B, T, D), in the dtype of x."""
    return backend("modulated_norm", x)(x, shift, scale, eps)
