"""mp_silu: silu that keeps unit magnitude, with a scale of each channel before it (Karras et al. 2024, EDM2, eq. 81).

s = x (1 + scale),  p = sigmoid(s),  y = s p / 0.596
y. = p (1 + s (1 - p)) / 0.596 (x. (1 + scale) + x scale.)
"""

from typing import Literal, overload

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


@overload
def mp_silu(x: Tensor | Dual, scale: Tensor | Dual | None = ..., also_x: Literal[False] = ...) -> Tensor | Dual: ...
@overload
def mp_silu(
    x: Tensor | Dual, scale: Tensor | Dual | None = ..., *, also_x: Literal[True]
) -> tuple[Tensor | Dual, Tensor | Dual]: ...
def mp_silu(x, scale=None, also_x=False):
    """x: (B, C, ...); scale: (B, C), of the dtype of x, or None -> y like x.

    also_x: gives (y, x), where x is the same tensor, to be read from here on. The gradient that then comes back to it is
    added where this op writes its own, in place of an addition of two tensors of that size.
    """
    return backend("mp_silu", x)(x, scale, also_x)
