"""modulated_norm in C++ and CUDA (csrc): one pass for value and tangent; the backward sums over T in fixed chunks.

Kept for the backward: x, scale, and half the mean and 2/std of each row in fp32 (`Kept` in csrc/row_math.h).
"""

import torch

from cmt_kernels import _native, transforms
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.modulated_norm import reference, through

unavailable = _native.unavailable


def modulated_norm(x, shift, scale, eps=1e-6, also_x=False):
    k, x_v, shift_v = rows(x, shift, scale), value(x), value(shift)
    if not _native.covers(x_v, "modulated_norm") or not _native.beside(shift_v, x_v):
        return reference.modulated_norm(x, shift, scale, eps, also_x)
    arguments = (
        *(x_v, shift_v, _native.like(value(scale), shift_v), _native.like(tangent(x), x_v)),
        *(_native.like(tangent(m), shift_v) for m in (shift, scale)),
        eps,
    )
    if also_x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        transforms.refuse("modulated_norm", "native")
        y, y_dot, x_v = _through(*arguments)
    else:
        y, y_dot, _ = _native.call("modulated_norm", *arguments)
    y = y if k is None else Dual(y, y_dot)
    return (y, x._replace(value=x_v) if isinstance(x, Dual) else x_v) if also_x else y


def _fake(x, shift, scale, x_dot, shift_dot, scale_dot, eps):
    k = next((m.shape[0] for m in (x_dot, shift_dot, scale_dot) if m is not None), 0)
    stats = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
    return shift.new_empty(x.shape), shift.new_empty(k, *x.shape[1:]), stats


def _setup_context(ctx, inputs, output):
    x, _, scale, *_ = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, scale, output[2])


def _backward(ctx, grad, *_):
    return (*torch.ops.cmt.modulated_norm_backward(grad, *ctx.saved_tensors, None), None, None, None, None)


def _backward_fake(grad, x, scale, stats, through):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _forward_below(*arguments):
    return _native.below_autograd(torch.ops.cmt.modulated_norm, *arguments)


def _backward_below(*arguments):
    op = torch.ops.cmt.modulated_norm_backward
    if torch.is_grad_enabled():  # a second derivative may be taken: the op says that it has none
        return op(*arguments)
    return _native.below_autograd(op, *arguments)


_through = through.function(_forward_below, _backward_below)


if not unavailable("cpu"):
    _native.register("modulated_norm", _fake, _setup_context, _backward, _backward_fake)
