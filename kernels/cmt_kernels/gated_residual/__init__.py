"""gated_residual: the adaLN-zero seam of a DiT block (Peebles & Xie 2023).

y  = x + gate (branch + bias)
y. = x. + gate. (branch + bias) + gate branch.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, bias: Tensor | None = None
) -> Tensor | Dual:
    """x, branch: (B, T, D); gate: (B, D); bias: (D,), deferred from the branch's linear -> (B, T, D), dtype of x.

    branch and gate are taken in their own dtype where they share one that is no wider than x's, else in x's.
    """
    return backend("gated_residual", x)(x, branch, gate, bias)
