"""Frozen networks in lower formats: fp8 products in the linears that hold nearly all the work, or weights cast once.

    y = (q_x q_w^T) s_x s_w + b     q = e4m3(x / s), s = max |x| / 448 of each row; w's once, x's in every call

What a network lends to fp8 its blocks say (`fp8`, names of linears): those on tokens. The first and last layers, the
modulation by time and label, norms and attention stay as autocast has them. On a GPU a product is torch._scaled_mm;
elsewhere the same q are multiplied in fp32, so what fp8 costs in accuracy can be seen on any machine.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cmt_fast.models.layers import BiasedOp

LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # what torch._scaled_mm asks of both widths


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (M, D) -> e4m3 numbers (M, D) and each row's scale (M, 1) float32."""
    scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_(min=1e-12)
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """A frozen linear in fp8: x (..., D) of any float dtype -> (..., E) bfloat16. `then`: as of models.layers.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(1, -1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor, then: BiasedOp | None = None) -> Tensor:
        bias = None if then else self.bias
        with torch.autocast(x.device.type, enabled=False):
            q, scale = quantised(x.reshape(-1, x.shape[-1]))
            if x.is_cuda:
                y = torch._scaled_mm(
                    q, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=bias, out_dtype=torch.bfloat16
                )
            else:
                y = (q.float() @ self.weight.float().t()) * scale * self.scale
                y = (y if bias is None else y + bias.float()).to(torch.bfloat16)
        y = y.view(*x.shape[:-1], -1)
        return then(y, self.bias) if then else y


def in_fp8(net: nn.Module) -> nn.Module:
    """A copy of a frozen network with the linears that its blocks lend in fp8; everything else it shares.

    Raises ValueError where there is none: a network of convolutions has nothing to win here.
    """
    made = shared(net)
    found = 0
    for block in list(made.modules()):
        for name in getattr(block, "fp8", ()):
            part = getattr(block, name)
            if isinstance(part, nn.ModuleList):
                for i, linear in enumerate(part):
                    part[i], found = (Fp8Linear(linear), found + 1) if _fits(linear) else (linear, found)
            elif _fits(part):
                setattr(block, name, Fp8Linear(part))
                found += 1
    if not found:
        raise ValueError("none of its linears can be multiplied in fp8")
    return made


def shared(net: nn.Module) -> nn.Module:
    """A copy of a frozen network that shares its memory, whose weights autocast casts once while it is entered.

    Autocast keeps a cast weight until it is left if the weight wants a gradient, and else casts it in every call.
    """
    memo = {id(p): nn.Parameter(p.detach()) for p in net.parameters()} | {id(b): b for b in net.buffers()}
    return copy.deepcopy(net, memo)


def _fits(linear: nn.Linear) -> bool:
    return not linear.in_features % MULTIPLE and not linear.out_features % MULTIPLE
