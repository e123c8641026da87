"""qk_norm: RMS norm of queries and keys per head, then rotary positions, on packed qkv (values pass through).

y = w xh, xh = x r, r = 1/sqrt(mean(x^2) + eps)        y. = w r (x. - xh mean(xh x.))
RoPE (Su et al. 2021) turns the halves (a, b) by the angle: (a cos - b sin, b cos + a sin); linear, so is its tangent.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def qk_norm(
    qkv: Tensor | Dual,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | Dual:
    """qkv: (B, T, 3, H, d); q_weight, k_weight: (d,), None skips the norm; cos, sin: (T, d/2), None skips RoPE.

    Returns the same shape and dtype.
    """
    return backend("qk_norm", qkv)(qkv, q_weight, k_weight, cos, sin, eps)
