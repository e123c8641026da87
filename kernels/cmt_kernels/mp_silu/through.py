"""What lets x go through mp_silu: its other gradient comes to this op's backward and is added there.

As modulated_norm/through.py: an autograd function may return its own input, an operator of torch.library may not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cmt_kernels import transforms


@functools.cache
def call(backend: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """f(x, scale, x_dot, scale_dot) -> (y, y_dot, x), all (B, T, D).

    forward: the same arguments -> (y, y_dot); backward: (dy, x, scale, what else comes to x or None) -> (dx, dscale).
    """

    def run(ctx, x, scale, *dots):
        y, y_dot = forward(x, scale, *dots)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(y_dot)
        ctx.save_for_backward(x, scale)
        return y, y_dot, x

    @transforms.once("mp_silu")
    def gradient(ctx, dy, _, onward):
        if dy is None:
            return onward, None, None, None
        x, scale = ctx.saved_tensors
        dx, dscale = backward(dy, x, scale, onward)
        return dx, None if scale is None else dscale, None, None

    members = {"forward": staticmethod(run), "backward": staticmethod(gradient)}
    function = type("mp_silu_through", (torch.autograd.Function,), members)

    def apply(*arguments):
        transforms.refuse("mp_silu", backend)
        return function.apply(*arguments)

    return apply
