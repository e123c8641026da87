"""meanflow_loss: the MeanFlow regression with adaptive weight (Geng et al. 2025, MeanFlow, eq. 10-11 and sec. 4).

target = v - (t - r) du/dt (stop-grad; rows without a tangent have r = t and target v)
l = sum (u - target)^2,  loss = l / sg[(l + c)^p]
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def meanflow_loss(
    u: Tensor | Dual, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """u: (B, ...) with tangent du/dt (k, ...) of the first k rows; v: (B, ...); t, r: (B,).

    Returns (loss (B,) with gradient, l (B,) detached, the plain squared error).
    """
    return backend("meanflow_loss", u)(u, v, t, r, p, c)
