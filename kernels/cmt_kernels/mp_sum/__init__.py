"""mp_sum: a sum that keeps the magnitude of its summands (Karras et al. 2024, EDM2, eq. 88), clipped to +-limit.

m = sqrt((1 - share)^2 + share^2),  s = ((1 - share) a + share b)/m,  y = min(max(s, -limit), limit)
y. = s. where |s| <= limit, else 0

What is kept for the backward is y, not a and b. So where y is the limit itself no gradient passes.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def mp_sum(a: Tensor | Dual, b: Tensor | Dual, share: float = 0.5, limit: float | None = None) -> Tensor | Dual:
    """a, b: (B, ...) of one shape and dtype; share of b in [0, 1]; limit > 0 or None -> y like a."""
    return backend("mp_sum", a)(a, b, share, limit)
