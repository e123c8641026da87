"""unit_weight in C++ and CUDA (csrc): length, division, cast and layout in one pass. Kept: the weight, two numbers a row.

What is kept is the parameter itself, not a view of it: ZeRO 3 releases a parameter after its forward and gathers it again for its
backward, and a view would hold what was released.
"""

import torch
from torch import Tensor

from cmt_kernels import _native, transforms
from cmt_kernels.unit_weight import reference

unavailable = _native.unavailable


def unit_weight(
    weight: Tensor,
    gain: float = 1.0,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    eps: float = 1e-4,
) -> Tensor:
    if not _native.covers(weight, "unit_weight") or weight.dtype != torch.float32:
        return reference.unit_weight(weight, gain, channels_last, dtype, eps)
    e, d, *sizes = weight.shape
    last, low = channels_last and len(sizes) == 2, dtype == torch.bfloat16
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        transforms.refuse("unit_weight", "native")
        y = _Unit.apply(weight, gain, eps, low, last)
    else:
        y, _ = _native.call("unit_weight", _cells(weight), gain, eps, low, last)
    y = y.view(e, *sizes, d).movedim(-1, 1) if last else y.view(weight.shape)
    return y if low or dtype is None else y.to(dtype)


def _cells(weight: Tensor) -> Tensor:
    """(E, D, ...) -> (E, D, numbers of a kernel)."""
    return weight.reshape(*weight.shape[:2], weight.shape[2:].numel())


class _Unit(torch.autograd.Function):
    """The registered gradient, of a parameter that is kept as it is."""

    @staticmethod
    def forward(ctx, weight, gain, eps, low, last):
        y, stats = _native.below_autograd(torch.ops.cmt.unit_weight, _cells(weight), gain, eps, low, last)
        ctx.gain, ctx.last = gain, last
        ctx.save_for_backward(weight, stats)
        return y

    @staticmethod
    @transforms.once("unit_weight")
    def backward(ctx, grad):
        weight, stats = ctx.saved_tensors
        arguments = grad, _cells(weight), stats, ctx.gain, ctx.last
        op = torch.ops.cmt.unit_weight_backward
        # where a second derivative may be taken the op says that it has none
        dw = op(*arguments) if torch.is_grad_enabled() else _native.below_autograd(op, *arguments)
        return dw.view(weight.shape), None, None, None, None


def _fake(weight, gain, eps, low, last):
    e, d, s = weight.shape
    y = weight.new_empty((e, s, d) if last else (e, d, s), dtype=torch.bfloat16 if low else torch.float32)
    return y, weight.new_empty(e, 2)


def _setup_context(ctx, inputs, output):
    weight, ctx.gain, _, _, ctx.last = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(weight, output[1])


def _backward(ctx, grad, _):
    return torch.ops.cmt.unit_weight_backward(grad, *ctx.saved_tensors, ctx.gain, ctx.last), *(None,) * 4


def _backward_fake(grad, weight, stats, gain, last):
    return weight.new_empty(weight.shape)


if not unavailable("cpu"):
    _native.register("unit_weight", _fake, _setup_context, _backward, _backward_fake)
