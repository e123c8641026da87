"""A residual MLP for vectors, conditioned on times and labels like the DiT, for Tensor | Dual."""

from __future__ import annotations

from typing import Any

import torch
from cmt_kernels import Dual, gated_residual, gelu, modulated_norm, silu
from cmt_kernels.dual import add, chunks, linear_map, value
from torch import Tensor, nn

from cmt_fast.models.layers import GuidanceEmbedder, LabelEmbedder, Linear, TimeEmbedder


class Mlp(nn.Module):
    """F(x, t, r, labels): x (B, D), t, r (B,) -> (B, D). Its blocks are the DiT's feed-forward half on one token.

    guided, velocity_head: as of a DiT.
    """

    fp8 = ("fc1", "fc2")  # what a frozen network may multiply in fp8

    def __init__(
        self, dim: int, classes: int, *, width: int, depth: int, two_times: bool = False, guided: bool = False,
        velocity_head: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = Linear(dim, width)
        self.time = TimeEmbedder(width)
        self.duration = TimeEmbedder(width) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        layers = lambda *sizes, n=depth: nn.ModuleList(Linear(*sizes) for _ in range(n))
        self.modulations, self.fc1, self.fc2 = (
            layers(width, 3 * width), layers(width, 2 * width), layers(2 * width, width)
        )  # fmt: skip
        self.final = Linear(width, dim, zero=True)
        self.guidance = GuidanceEmbedder(width) if guided else None
        self.branch = None if velocity_head is None else depth - velocity_head
        if velocity_head is not None:
            n = velocity_head
            self.head_modulations, self.head_fc1, self.head_fc2 = (
                layers(width, 3 * width, n=n), layers(width, 2 * width, n=n), layers(2 * width, width, n=n)
            )  # fmt: skip
            self.head_final = Linear(width, dim, zero=True)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        *,
        also: bool = False,
        guide: Tensor | None = None,
    ) -> Tensor | Dual | tuple[Tensor | Dual, Tensor]:
        h = linear_map(lambda y: y.unsqueeze(1), self.embed(x))  # (B, 1, width)
        c = self.time(t)
        if self.duration is not None:
            c = add(c, self.duration(add(t, linear_map(torch.neg, t if r is None else r))))
        if self.label is not None:
            c = add(c, self.label(labels, drop))
        if self.guidance is not None and guide is not None:
            c = add(c, self.guidance(guide, value(t)))
        c, branched = silu(c), None
        for i, layers in enumerate(zip(self.modulations, self.fc1, self.fc2)):
            branched = value(h) if i == self.branch else branched
            h = _block(layers, h, c)
        out = self.final(linear_map(lambda y: y.squeeze(1), h))
        if not also:
            return out
        v, c_v = value(h) if branched is None else branched, value(c)
        for layers in zip(self.head_modulations, self.head_fc1, self.head_fc2):
            v = _block(layers, v, c_v)
        return out, value(self.head_final(v.squeeze(1)))


def _block(layers: tuple[Linear, Linear, Linear], h: Tensor | Dual, c: Tensor | Dual) -> Any:
    modulation, fc1, fc2 = layers
    shift, scale, gate = chunks(modulation(c), 3)
    normed, h = modulated_norm(h, shift, scale, also_x=True)
    return fc2(fc1(normed, gelu), lambda y, bias: gated_residual(h, y, gate, bias))
