"""Parameter-owning modules over the ops. Each consumes the tangent in its own `__call__`: ZeRO and FSDP gather there."""

from __future__ import annotations

import math

import torch
from cmt_kernels import Dual, label_embedding, linear, silu, time_embedding
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b for Tensor | Dual. x: (..., D) -> (..., E). `zero` starts weight and bias at 0."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True, zero: bool = False) -> None:
        super().__init__(d_in, d_out, bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        return linear(x, self.weight, self.bias)


class TimeEmbedder(nn.Module):
    """t: (B,) -> (B, width): sinusoidal features and a two-layer MLP, in fp32 whatever autocast says.

    A tangent through this module grows with its highest frequency, so it never runs in bf16.
    """

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.hidden = Linear(features, width)
        self.out = Linear(width, width)
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))

    def forward(self, t: Tensor | Dual) -> Tensor | Dual:
        device = (t.value if isinstance(t, Dual) else t).device.type
        with torch.autocast(device, enabled=False):
            return self.out(silu(self.hidden(time_embedding(t, self.features))))


class LabelEmbedder(nn.Module):
    """labels: (B,) in [0, classes] -> (B, width); row `classes` is the null class; drop: (B,) bool takes it."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Parameter(torch.randn(classes + 1, width) * 0.02)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        return label_embedding(labels, self.table, drop)
