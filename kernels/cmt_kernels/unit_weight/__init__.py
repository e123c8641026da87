"""unit_weight: each row of a weight at unit magnitude, times a gain (Karras et al. 2024, EDM2, eq. 47 and 66).

n_e = eps + |w_e|/sqrt(N),  y_e = gain w_e/n_e
dw_e = gain/n_e (dy_e - w_e <dy_e, w_e>/(|w_e| sqrt(N) n_e))                (N: numbers of a row)
"""

import torch
from torch import Tensor

from cmt_kernels._op import backend


def unit_weight(
    weight: Tensor,
    gain: float = 1.0,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """weight: (E, D) or (E, D, n, n), float32 -> the same shape, in `dtype` if one is given.

    channels_last: (E, D, n, n) lies so in memory, as a convolution of images that do reads it.
    """
    return backend("unit_weight", weight)(weight, gain, channels_last, dtype, eps)
