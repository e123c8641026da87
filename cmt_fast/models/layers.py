"""Parameter-owning modules over the ops. Each consumes the tangent in its own `__call__`: ZeRO and FSDP gather there.

Also here: how a block forgets its activations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from cmt_kernels import (
    Dual,
    conv2d,
    fourier_embedding,
    group_norm,
    label_embedding,
    linear,
    modulated_norm,
    modulated_rms_norm,
    silu,
    time_embedding,
)
from cmt_kernels.dual import in_dtype, tangent, value
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmt_fast.models import products
from cmt_fast.models.shapes import counting

BiasedOp = Callable[[Tensor | Dual, Tensor | None], Tensor | Dual]


def in_fp32(x: Tensor | Dual) -> contextlib.AbstractContextManager[None]:
    """Autocast turned off on the device of x; on the meta device, which autocast does not know, nothing is to be done."""
    device = value(x).device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def as_stream(h: Tensor | Dual, bf16: bool) -> Tensor | Dual:
    """A residual stream where it begins: as it is, or in bf16 where that is asked for and autocast is on."""
    return in_dtype(h, torch.bfloat16) if bf16 and torch.is_autocast_enabled(value(h).device.type) else h


class Linear(nn.Linear):
    """y = x W^T + b for Tensor | Dual. x: (..., D) -> (..., E). `zero` starts weight and bias at 0.

    then: the op that follows and adds the bias itself, gelu or gated_residual: then(x W^T, b). Its backward, which has the
    rows in hand, also sums them for the bias.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = True, zero: bool = False) -> None:
        super().__init__(d_in, d_out, bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def lend(self, copies: dict[str, Tensor]) -> None:
        """Read these bf16 copies of the own parameters where autocast asks for bf16 (models/products.py)."""
        for name, copy in copies.items():
            products.lend(self.get_parameter(name), copy)

    def forward(self, x: Tensor | Dual, then: BiasedOp | None = None) -> Tensor | Dual:
        bias = self.bias if then is None else None
        y = products.product(x, self.weight, bias) if products.lent(self.weight) else linear(x, self.weight, bias)
        return y if then is None else then(y, self.bias)


class Conv(nn.Conv2d):
    """y = W * x + b with the size kept, for Tensor | Dual. x: (B, C, H, W) -> (B, E, H, W); kernel odd."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        return conv2d(x, self.weight, self.bias)


class GroupNorm(nn.Module):
    """x: (B, C, H, W) -> the same, mean 0 and variance 1 in groups of at least 4 channels, at most 32 groups."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        return group_norm(x, self.weight, self.bias, self.groups, self.eps)


class LayerNorm(nn.Module):
    """x: (B, T, D) -> mean 0 and variance 1 over D, then adaLN's scale and shift (B, D); and x, to go on with.

    Owns nothing. What reads the x that it gives leaves one gradient of the stream, not two to be added.
    """

    def forward(
        self, x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual
    ) -> tuple[Tensor | Dual, Tensor | Dual]:
        return modulated_norm(x, shift, scale, also_x=True)


class RmsNorm(nn.Module):
    """x: (B, T, D) -> mean square 1 over D, times a weight, then adaLN's scale and shift (B, D); and x, as LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual
    ) -> tuple[Tensor | Dual, Tensor | Dual]:
        return modulated_rms_norm(x, self.weight, shift, scale), x


class TimeEmbedder(nn.Module):
    """t: (B,) -> (B, width): sinusoidal features and a two-layer MLP, in fp32 whatever autocast says.

    A tangent through this module grows with its highest frequency, so it never runs in bf16. kind: "cmt" has `features` waves;
    "dit" the 256 of DiT, SiT and their kin, frequencies from 1 down to 1/10000; "gaussian" the 512 of RAE, frequencies
    2 pi N(0, 1), drawn once and kept with the weights.
    """

    def __init__(self, width: int, features: int = 64, kind: str = "cmt") -> None:
        super().__init__()
        self.features = features = {"cmt": features, "dit": 256, "gaussian": 512}[kind]
        frequency = None
        if kind == "dit":
            frequency = torch.exp(-math.log(1e4) * (torch.arange(128, dtype=torch.float32) / 128))
        elif kind == "gaussian":
            frequency = 2 * math.pi * torch.randn(features // 2)
        self.register_buffer("frequency", frequency, persistent=kind == "gaussian")
        self.hidden = Linear(features, width)
        self.out = Linear(width, width)
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))

    def forward(self, t: Tensor | Dual) -> Tensor | Dual:
        with in_fp32(t):
            known = self.frequency is not None
            waves = fourier_embedding(t, self.frequency) if known else time_embedding(t, self.features)
            return self.out(silu(self.hidden(waves)))


class LabelEmbedder(nn.Module):
    """labels: (B,) in [0, classes] -> (B, width); row `classes` is the null class; drop: (B,) bool takes it."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Parameter(torch.randn(classes + 1, width) * 0.02)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        return label_embedding(labels, self.table, drop)


class GuidanceEmbedder(nn.Module):
    """guide: (B, 3), scale omega >= 1 and interval [low, high] of times -> (B, width).

    As published (improved MeanFlow) the scale enters as 1 - 1/omega, each number by waves and two layers. What is added is the
    difference to no guidance, (1, 0, 1): it begins at 0, where the network is what it is without, and a stage that is told none
    trains nothing here, so that its network says the same at every scale rather than what no row has taught it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.omega, self.low, self.high = (TimeEmbedder(width) for _ in range(3))
        for own in (self.omega, self.low, self.high):
            nn.init.zeros_(own.out.weight)

    def forward(self, guide: Tensor, like: Tensor) -> Tensor:
        omega, low, high = guide.to(like.dtype).unbind(1)
        zero, one = torch.zeros_like(low), torch.ones_like(high)
        told = self.omega(1 - 1 / omega) + self.low(low) + self.high(high)
        return told - (self.omega(zero) + self.low(zero) + self.high(one))


class LogVariance(nn.Module):
    """c_noise: (B,) -> u (B,), the log of the expected loss at that noise: a linear layer over waves of c_noise.

    What a loss with learned weights (`uncertainty`) asks of a network that has no such head as published; sampling never does. It
    begins at 0, where every noise weighs 1.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.features, self.out = features, Linear(features, 1, zero=True)

    def forward(self, c_noise: Tensor) -> Tensor:
        with in_fp32(c_noise):
            return self.out(time_embedding(c_noise, self.features, max_frequency=16.0))[:, 0]


def recomputed(block: Callable, *xs: Tensor | Dual) -> Tensor | Dual:
    """block(*xs), one Tensor | Dual, keeping for the backward pass only the values of xs and running the block again there.

    Tangents save nothing and no gradient reads them, so only values run again. Under torch.compile the whole block
    is marked for it, and the tangents that nothing reads are dropped from the graph of the backward pass, those of fused
    ops by `cmt_kernels.graph`.
    """
    values, tangents = [value(x) for x in xs], [tangent(x) for x in xs if isinstance(x, Dual)]
    dual = [isinstance(x, Dual) for x in xs]

    def whole(*ys: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        dots = iter(ys[len(dual) :])
        y = block(*(Dual(y, next(dots)) if has else y for y, has in zip(ys, dual)))
        return (y.value, y.tangent) if isinstance(y, Dual) else y

    if torch.compiler.is_compiling():
        y = checkpoint(whole, *values, *tangents, use_reentrant=False, preserve_rng_state=False)
        return Dual(*y) if isinstance(y, tuple) else y
    pending, found = [tangents], []

    def run(*ys: Tensor) -> Tensor:
        if not pending:  # the backward pass: values alone
            return block(*ys)
        y = whole(*ys, *pending.pop())
        if not isinstance(y, tuple):
            return y
        found.append(y[1])
        return y[0]

    if counting():  # torch's own would import a compiler
        y = _keeping_inputs(run, *values)
    else:
        y = checkpoint(run, *values, use_reentrant=False, preserve_rng_state=False)
    return Dual(y, found.pop()) if found else y


class _Saved(torch.autograd.Function):
    """Saves tensors for a backward that never comes."""

    @staticmethod
    def forward(ctx: Any, asked: Tensor, *xs: Tensor) -> Tensor:
        ctx.save_for_backward(*xs)
        return torch.empty_like(asked)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> None:
        raise AssertionError("what is counted has no backward pass")


def _keeping_inputs(run: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """run(*values), saving what checkpoint() saves of it: the values, for whoever counts what is saved."""
    _Saved.apply(torch.empty(0, requires_grad=True), *values)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda _: None):
        return run(*values)
