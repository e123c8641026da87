"""What lets x go through modulated_norm: its other gradient comes to this op's backward and is added there.

An operator of torch.library may not return its own input, an autograd function may. Under torch.compile, where only
operators are seen, the two gradients are added by the compiled graph instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmt_kernels import transforms


def function(forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """f(x, shift, scale, *others) -> (y, y_dot, x).

    forward: the same arguments -> (y, y_dot, *kept); backward: (dy, x, scale, *kept, what else comes to x or None) ->
    (dx, dshift, dscale).
    """

    def run(ctx, x, shift, scale, *others):
        y, y_dot, *kept = forward(x, shift, scale, *others)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(y_dot)
        ctx.save_for_backward(x, scale, *kept)
        return y, y_dot, x

    @transforms.once("modulated_norm")
    def gradient(ctx, dy, _, onward):
        if dy is None:
            return onward, *(None,) * (len(ctx.needs_input_grad) - 1)
        return *backward(dy, *ctx.saved_tensors, onward), *(None,) * (len(ctx.needs_input_grad) - 3)

    members = {"forward": staticmethod(run), "backward": staticmethod(gradient)}
    return type("modulated_norm_through", (torch.autograd.Function,), members).apply
