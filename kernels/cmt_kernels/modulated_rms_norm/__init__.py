"""modulated_rms_norm: RMS norm with a weight (Zhang & Sennrich 2019), then adaLN scale and shift (LightningDiT).

r = 1/sqrt(mean(x^2) + eps),  xh = x r,  y = w xh (1 + scale) + shift          (over the last dim)
xh. = r (x. - xh mean(xh x.)),  y. = w (xh. (1 + scale) + xh scale.) + shift.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def modulated_rms_norm(
    x: Tensor | Dual, weight: Tensor, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6
) -> Tensor | Dual:
    """x: (B, T, D); weight: (D,); shift, scale: (B, D) -> (B, T, D), in the dtype of shift; the mean in fp32 or wider."""
    return backend("modulated_rms_norm", x)(x, weight, shift, scale, eps)
