"""modulated_norm: LayerNorm without affine, then adaLN scale and shift (Peebles & Xie 2023, DiT).

r = 1/sqrt(var + eps),  xh = (x - mean) r,  y = xh (1 + scale) + shift          (over the last dim)
xh. = r (x. - mean(x.) - xh mean(xh x.))
y.  = xh. (1 + scale) + xh scale. + shift.

| x, its tangent and gradient | shift, scale, y, their tangents and gradients | inside |
|---|---|---|
| float32 | float32 | float32 |
| float32, the residual stream | bfloat16, the branches under autocast | float32, rounded once |
| bfloat16 | bfloat16 | float32 (the reference: bfloat16 after the norm) |

So no cast stands between a stream in float32 and a linear in bfloat16, and none would change a bit.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


@overload
def modulated_norm(
    x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = ..., also_x: Literal[False] = ...
) -> Tensor | Dual: ...
@overload
def modulated_norm(
    x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = ..., *, also_x: Literal[True]
) -> tuple[Tensor | Dual, Tensor | Dual]: ...
def modulated_norm(x, shift, scale, eps=1e-6, also_x=False):
    """x: (B, T, D); shift, scale: (B, D), of one dtype -> y (B, T, D), in the dtype of shift.

    also_x: gives (y, x), where x is the same tensor, to be read from here on. The gradient that then comes back to it is
    added where this op writes its own, in place of an addition of two tensors of that size.
    """
    return backend("modulated_norm", x)(x, shift, scale, eps, also_x)
