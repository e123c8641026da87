"""gated_residual in C++ and CUDA (csrc): one pass for value and tangent; the backward sums over T in fixed chunks.

Kept for the backward: branch, gate and bias. The gradient of x is the gradient of y, the same tensor.
"""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gated_residual import reference

unavailable = _native.unavailable


def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, bias: Tensor | None = None
) -> Tensor | Dual:
    k, x_v = rows(x, branch, gate), value(x)
    if not _native.covers(x_v, "gated_residual"):
        return reference.gated_residual(x, branch, gate, bias)
    as_branch = value(branch)
    if as_branch.dtype != value(gate).dtype or not _native.beside(as_branch, x_v):
        as_branch = x_v
    values = (_native.like(value(m), as_branch) for m in (branch, gate))
    tangents = (_native.like(tangent(x), x_v), *(_native.like(tangent(m), as_branch) for m in (branch, gate)))
    y, y_dot = _native.call("gated_residual", x_v, *values, _native.wide(bias), *tangents)
    return y if k is None else Dual(y, y_dot)


def _fake(x, branch, gate, bias, x_dot, branch_dot, gate_dot):
    k = next((m.shape[0] for m in (x_dot, branch_dot, gate_dot) if m is not None), 0)
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:])


def _setup_context(ctx, inputs, output):
    _, branch, gate, bias, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(branch, gate, bias)


def _backward(ctx, grad, _):
    branch, gate, bias = ctx.saved_tensors
    dbranch, dgate, dbias = torch.ops.cmt.gated_residual_backward(grad, branch, gate, bias)
    return grad, dbranch, dgate, None if bias is None else dbias, None, None, None


def _backward_fake(grad, branch, gate, bias):
    dbias = branch.new_empty(0 if bias is None else gate.shape[1], dtype=torch.float32)
    return branch.new_empty(branch.shape), branch.new_empty(gate.shape), dbias


if not unavailable("cpu"):
    _native.register("gated_residual", _fake, _setup_context, _backward, _backward_fake)
