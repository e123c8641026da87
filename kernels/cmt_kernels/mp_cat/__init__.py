"""mp_cat: a and b side by side, each with an equal part in the magnitude (Karras et al. 2024, EDM2, eq. 103).

m = sqrt((A + B)/2),  y = (m a/sqrt(A), m b/sqrt(B)),  y. the same of a. and b.      (A, B: channels of a and b)
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def mp_cat(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    """a: (B, C, ...), b: (B, C', ...), of one dtype -> (B, C + C', ...)."""
    return backend("mp_cat", a)(a, b)
