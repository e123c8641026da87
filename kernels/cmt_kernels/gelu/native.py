"""gelu in C++ and CUDA (csrc): value, tangent and the sum for the bias each in one pass."""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.dual import Dual, tangent, value
from cmt_kernels.gelu import reference

unavailable = _native.unavailable


def gelu(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    x_v, x_dot = value(x), tangent(x)
    if not _native.covers(x_v, "gelu"):
        return reference.gelu(x, bias)
    y, y_dot = _native.call("gelu", x_v, _native.wide(bias), x_dot)
    return y if x_dot is None else Dual(y, y_dot)


def _fake(x, bias, x_dot):
    return x.new_empty(x.shape), x.new_empty((0 if x_dot is None else x_dot.shape[0], *x.shape[1:]))


def _setup_context(ctx, inputs, output):
    x, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad, _):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.cmt.gelu_backward(grad, x, bias)
    return dx, None if bias is None else dbias, None


def _backward_fake(grad, x, bias):
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


if not unavailable("cpu"):
    _native.register("gelu", _fake, _setup_context, _backward, _backward_fake)
