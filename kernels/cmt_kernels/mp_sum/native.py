"""mp_sum in C++ and CUDA (csrc): one pass over numbers that lie in the same order, channels-last or not."""

import math

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.channels import alike
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.mp_sum import reference

unavailable = _native.unavailable


def mp_sum(a: Tensor | Dual, b: Tensor | Dual, share: float = 0.5, limit: float | None = None) -> Tensor | Dual:
    k, a_v, b_v = rows(a, b), value(a), value(b)
    if not _native.covers(a_v, "mp_sum") or a_v.dtype != b_v.dtype or a_v.shape != b_v.shape:
        return reference.mp_sum(a, b, share, limit)
    a_v = alike(a_v, a_v)
    order = (0, *range(2, a_v.ndim), 1) if not a_v.is_contiguous() else tuple(range(a_v.ndim))
    flat = lambda x: None if x is None else alike(x.to(a_v.dtype), a_v).permute(order)
    numbers = math.inf if limit is None else limit
    y, y_dot = _native.call(
        "mp_sum", *map(flat, (a_v, b_v, tangent(a), tangent(b))), *reference.weights(share), numbers
    )
    back = [order.index(i) for i in range(a_v.ndim)]
    return y.permute(back) if k is None else Dual(y.permute(back), y_dot.permute(back))


def _fake(a, b, a_dot, b_dot, weight_a, weight_b, limit):
    k = next((m.shape[0] for m in (a_dot, b_dot) if m is not None), 0)
    return a.new_empty(a.shape), a.new_empty(k, *a.shape[1:])


def _setup_context(ctx, inputs, output):
    *_, ctx.weight_a, ctx.weight_b, ctx.limit = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[0] if math.isfinite(ctx.limit) else None)


def _backward(ctx, grad, _):
    (y,) = ctx.saved_tensors
    da, db = torch.ops.cmt.mp_sum_backward(grad, y, ctx.weight_a, ctx.weight_b, ctx.limit)
    return da, db, *(None,) * 5


def _backward_fake(grad, y, weight_a, weight_b, limit):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


if not unavailable("cpu"):
    _native.register("mp_sum", _fake, _setup_context, _backward, _backward_fake)
