"""path_point in plain torch."""

from torch import Tensor

from cmt_kernels import philox
from cmt_kernels.philox import Key


def path_point(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, alpha_dot: Tensor, sigma_dot: Tensor, key: Key, sample: Tensor
) -> tuple[Tensor, Tensor]:
    eps = philox.normal(key, sample, tuple(x_0.shape[1:])).to(x_0.dtype)
    a, s, a_dot, s_dot = (c.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1)) for c in (alpha, sigma, alpha_dot, sigma_dot))
    return a * x_0 + s * eps, a_dot * x_0 + s_dot * eps
