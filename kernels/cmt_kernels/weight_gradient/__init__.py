"""weight_gradient: the gradient of a linear's weight, added where all the step's gradients are: g <- g + dy^T x.

| dy, x | g | inside |
|---|---|---|
| float32 | float32 | float32 |
| bfloat16, of a linear under autocast | float32 | the product in float32, never rounded |

So a gradient in bfloat16 is neither written, nor read for a cast, nor added by a kernel of its own.
"""

from torch import Tensor

from cmt_kernels._op import backend


def weight_gradient(g: Tensor, dy: Tensor, x: Tensor) -> None:
    """g: (E, D), changed in place; dy: (..., E) and x: (..., D), in one dtype that is no wider than g's."""
    backend("weight_gradient", g)(g, dy, x)
