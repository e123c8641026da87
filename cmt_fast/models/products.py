"""A linear's products in training in bf16: weights cast once a step, their gradients added in fp32 where they are kept.

Autocast casts every weight in every step, and its backward writes each gradient in bf16, casts it and adds it: four kernels
a weight beside the product. The local engine on a GPU holds a bf16 copy of its flat parameters, which one kernel makes,
and lends it here; `weight_gradient` adds each product to the engine's flat fp32 gradient without rounding it.

So a gradient is for `backward` alone: `torch.autograd.grad` of such a weight is None, and no second derivative is taken.
What is lent hangs on the parameters of the network that is trained. Copies of it, its EMA among them, have none and take
autocast's way, as does all that runs under torch.compile.
"""

from __future__ import annotations

import torch
from cmt_kernels import Dual, weight_gradient
from cmt_kernels.dual import tangent_rule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def lend(p: nn.Parameter, copy: Tensor) -> None:
    """From here on `copy`, p in bf16, is what products read, and p's gradient, which is there, what they are added to."""
    assert p.grad is not None and copy.shape == p.shape
    p.lent = copy  # type: ignore[attr-defined]


def lent(weight: Tensor) -> bool:
    """Whether the products of this weight go this way now: under autocast, outside of compiled code."""
    here = getattr(weight, "lent", None)
    return here is not None and not torch.compiler.is_compiling() and torch.is_autocast_enabled(here.device.type)


def product(x: Tensor | Dual, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor | Dual:
    """x W^T + b from the lent copies, as autocast computes it: (..., D) -> (..., E) in bf16, gradients into .grad."""
    w, b = weight.lent, None if bias is None else bias.lent  # type: ignore[union-attr]
    with torch.autocast(w.device.type, enabled=False):
        x_v = (x.value if isinstance(x, Dual) else x).to(w.dtype)
        y = _Product.apply(x_v, weight, bias) if torch.is_grad_enabled() else F.linear(x_v, w, b)
        if not isinstance(x, Dual):
            return y
        with tangent_rule():
            return Dual(y, F.linear(x.tangent.to(w.dtype), w))


class _Product(torch.autograd.Function):
    """weight and bias are arguments so that y has a gradient; theirs are added to .grad here, autograd is given none."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return F.linear(x, weight.lent, None if bias is None else bias.lent)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            weight_gradient(ctx.weight.grad, dy, x)
        if ctx.needs_input_grad[2]:
            ctx.bias.grad.add_(dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias.grad.dtype))
        return dy @ ctx.weight.lent if ctx.needs_input_grad[0] else None, None, None
