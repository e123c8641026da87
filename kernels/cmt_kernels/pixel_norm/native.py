"""pixel_norm in C++ and CUDA (csrc): one pass for value and tangent.

Kept for the backward: y, which what follows keeps too, and two numbers a row in fp32 (`Length` in csrc/row_math.h).
"""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.pixel_norm import reference

unavailable = _native.unavailable


def pixel_norm(x: Tensor | Dual, dim: int = 1, eps: float = 1e-4) -> Tensor | Dual:
    k, x_v = rows(x), value(x)
    if not _native.covers(x_v, "pixel_norm"):
        return reference.pixel_norm(x, dim, eps)
    last = x_v.movedim(dim, -1)
    shape = last.shape[1:]
    flat = lambda m: None if m is None else m.movedim(dim, -1).reshape(len(m), shape[:-1].numel(), shape[-1])
    y, y_dot, _ = _native.call("pixel_norm", flat(x_v), _native.like(flat(tangent(x)), x_v), eps)
    back = lambda m: m.view(len(m), *shape).movedim(-1, dim)
    return back(y) if k is None else Dual(back(y), back(y_dot))


def _fake(x, x_dot, eps):
    k = 0 if x_dot is None else x_dot.shape[0]
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:]), x.new_empty(*x.shape[:2], 2, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[0], output[2])


def _backward(ctx, grad, *_):
    return torch.ops.cmt.pixel_norm_backward(grad, *ctx.saved_tensors), None, None


def _backward_fake(grad, y, stats):
    return y.new_empty(y.shape)


if not unavailable("cpu"):
    _native.register("pixel_norm", _fake, _setup_context, _backward, _backward_fake)
