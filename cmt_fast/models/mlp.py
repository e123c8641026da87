"""A residual MLP for vectors, conditioned on times and labels like the DiT, for Tensor | Dual."""

from __future__ import annotations

import torch
from cmt_kernels import Dual, gated_residual, gelu, modulated_norm, silu
from cmt_kernels.dual import add, chunks, linear_map
from torch import Tensor, nn

from cmt_fast.models.layers import LabelEmbedder, Linear, TimeEmbedder


class Mlp(nn.Module):
    """F(x, t, r, labels): x (B, D), t, r (B,) -> (B, D). Its blocks are the DiT's feed-forward half on one token."""

    fp8 = ("fc1", "fc2")  # what a frozen network may multiply in fp8

    def __init__(self, dim: int, classes: int, *, width: int, depth: int, two_times: bool = False) -> None:
        super().__init__()
        self.embed = Linear(dim, width)
        self.time = TimeEmbedder(width)
        self.duration = TimeEmbedder(width) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        self.modulations = nn.ModuleList(Linear(width, 3 * width) for _ in range(depth))
        self.fc1 = nn.ModuleList(Linear(width, 2 * width) for _ in range(depth))
        self.fc2 = nn.ModuleList(Linear(2 * width, width) for _ in range(depth))
        self.final = Linear(width, dim, zero=True)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor | Dual:
        h = linear_map(lambda y: y.unsqueeze(1), self.embed(x))  # (B, 1, width)
        c = self.time(t)
        if self.duration is not None:
            c = add(c, self.duration(add(t, linear_map(torch.neg, t if r is None else r))))
        if self.label is not None:
            c = add(c, self.label(labels, drop))
        c = silu(c)
        for modulation, fc1, fc2 in zip(self.modulations, self.fc1, self.fc2):
            shift, scale, gate = chunks(modulation(c), 3)
            normed, h = modulated_norm(h, shift, scale, also_x=True)
            h = fc2(fc1(normed, gelu), lambda y, bias, h=h, gate=gate: gated_residual(h, y, gate, bias))
        return self.final(linear_map(lambda y: y.squeeze(1), h))
