"""mp_silu in C++ and CUDA (csrc): one pass for value and tangent; the backward sums the scale's gradient in fixed chunks.

Kept for the backward: x and scale.
"""

import torch

from cmt_kernels import _native
from cmt_kernels.channels import image, pixels
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.mp_silu import reference, through

unavailable = _native.unavailable


def mp_silu(x, scale=None, also_x=False):
    k, x_v = rows(x, scale), value(x)
    if not _native.covers(x_v, "mp_silu"):
        return reference.mp_silu(x, scale, also_x)
    x_rows, dot = pixels(x_v), tangent(x)
    arguments = (
        *(x_rows, None if scale is None else _native.like(value(scale), x_v)),
        *(None if dot is None else _native.like(pixels(dot), x_v), _native.like(tangent(scale), x_v)),
    )
    if also_x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, y_dot, x_rows = through.call("native", _forward_below, _backward_below)(*arguments)
        x_v = image(x_rows, x_v.shape)
    else:
        y, y_dot = _native.call("mp_silu", *arguments)
    y = image(y, x_v.shape)
    y = y if k is None else Dual(y, image(y_dot, x_v.shape))
    return (y, x._replace(value=x_v) if isinstance(x, Dual) else x_v) if also_x else y


def _fake(x, scale, x_dot, scale_dot):
    k = next((m.shape[0] for m in (x_dot, scale_dot) if m is not None), 0)
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad, _):
    x, scale = ctx.saved_tensors
    dx, dscale = torch.ops.cmt.mp_silu_backward(grad, x, scale, None)
    return dx, None if scale is None else dscale, None, None


def _backward_fake(grad, x, scale, through):
    return x.new_empty(x.shape), x.new_empty(0 if scale is None else scale.shape)


def _forward_below(*arguments):
    return _native.below_autograd(torch.ops.cmt.mp_silu, *arguments)


def _backward_below(*arguments):
    op = torch.ops.cmt.mp_silu_backward
    if torch.is_grad_enabled():  # a second derivative may be taken: the op says that it has none
        return op(*arguments)
    return _native.below_autograd(op, *arguments)


if not unavailable("cpu"):
    _native.register("mp_silu", _fake, _setup_context, _backward, _backward_fake)
