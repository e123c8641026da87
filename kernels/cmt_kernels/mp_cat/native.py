"""mp_cat in C++ and CUDA (csrc): both parts read, scaled and written once."""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.channels import image, pixels
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.mp_cat import reference

unavailable = _native.unavailable


def mp_cat(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    k, a_v, b_v = rows(a, b), value(a), value(b)
    if not _native.covers(a_v, "mp_cat") or a_v.dtype != b_v.dtype:
        return reference.mp_cat(a, b)
    flat = lambda x: None if x is None else pixels(x.to(a_v.dtype))
    weights = reference.weights(a_v.shape[1], b_v.shape[1])
    y, y_dot = _native.call("mp_cat", *map(flat, (a_v, b_v, tangent(a), tangent(b))), *weights)
    return image(y, a_v.shape) if k is None else Dual(image(y, a_v.shape), image(y_dot, a_v.shape))


def _fake(a, b, a_dot, b_dot, weight_a, weight_b):
    k = next((m.shape[0] for m in (a_dot, b_dot) if m is not None), 0)
    shape = a.shape[1], a.shape[2] + b.shape[2]
    return a.new_empty(a.shape[0], *shape), a.new_empty(k, *shape)


def _setup_context(ctx, inputs, output):
    a, *_, ctx.weight_a, ctx.weight_b = inputs
    ctx.first = a.shape[2]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    da, db = torch.ops.cmt.mp_cat_backward(grad, ctx.first, ctx.weight_a, ctx.weight_b)
    return da, db, *(None,) * 4


def _backward_fake(grad, first, weight_a, weight_b):
    b, t, d = grad.shape
    return grad.new_empty(b, t, first), grad.new_empty(b, t, d - first)


if not unavailable("cpu"):
    _native.register("mp_cat", _fake, _setup_context, _backward, _backward_fake)
