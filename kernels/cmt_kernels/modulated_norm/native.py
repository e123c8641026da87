"""modulated_norm in C++ and CUDA (csrc): one pass for value and tangent; the backward sums over T in fixed chunks.

Kept for the backward: x, scale, and half the mean and 2/std of each row in fp32 (`Kept` in csrc/row_math.h).
"""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.modulated_norm import reference

unavailable = _native.unavailable


def modulated_norm(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, eps: float = 1e-6) -> Tensor | Dual:
    k, x_v = rows(x, shift, scale), value(x)
    if not _native.covers(x_v, "modulated_norm"):
        return reference.modulated_norm(x, shift, scale, eps)
    values = (_native.like(value(m), x_v) for m in (shift, scale))
    tangents = (_native.like(tangent(m), x_v) for m in (x, shift, scale))
    y, y_dot, _ = _native.call("modulated_norm", x_v, *values, *tangents, eps)
    return y if k is None else Dual(y, y_dot)


def _fake(x, shift, scale, x_dot, shift_dot, scale_dot, eps):
    k = next((m.shape[0] for m in (x_dot, shift_dot, scale_dot) if m is not None), 0)
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:]), x.new_empty(*x.shape[:2], 2, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, _, scale, *_ = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, scale, output[2])


def _backward(ctx, grad, *_):
    return (*torch.ops.cmt.modulated_norm_backward(grad, *ctx.saved_tensors), None, None, None, None)


def _backward_fake(grad, x, scale, stats):
    return x.new_empty(x.shape), x.new_empty(scale.shape), x.new_empty(scale.shape)


if not unavailable("cpu"):
    _native.register("modulated_norm", _fake, _setup_context, _backward, _backward_fake)
