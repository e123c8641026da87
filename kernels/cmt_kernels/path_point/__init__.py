"""path_point: a point of the forward path and its conditional velocity, with noise drawn in place.

    eps = Philox(key; sample),  x_t = alpha x_0 + sigma eps,  v = alpha' x_0 + sigma' eps

VE (EDM): alpha = 1, sigma = t, so v = eps. Linear flow: alpha = 1 - t, sigma = t, so v = eps - x_0.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.philox import Key


def path_point(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, alpha_dot: Tensor, sigma_dot: Tensor, key: Key, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """x_0: (B, ...); alpha, sigma and their time derivatives: (B,); sample: (B,) int64 ids of the rows.

    Returns (x_t, v), each (B, ...) in the dtype of x_0.
    """
    return backend("path_point", x_0)(x_0, alpha, sigma, alpha_dot, sigma_dot, key, sample)
