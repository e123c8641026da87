"""pixel_norm: unit root mean square along one dimension, without weights (Karras et al. 2024, EDM2, eq. 30).

n = eps + |x|/sqrt(N),  y = x/n             n. = <x, x.>/(|x| sqrt(N)),  y. = (x. - y n.)/n
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def pixel_norm(x: Tensor | Dual, dim: int = 1, eps: float = 1e-4) -> Tensor | Dual:
    """x: (B, ...); dim: the one of length N, not the first -> the same shape and dtype; lengths in fp32 or wider."""
    return backend("pixel_norm", x)(x, dim, eps)
