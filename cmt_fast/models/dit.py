"""The diffusion transformer (Peebles & Xie 2023) with adaLN-zero, one or two times, for Tensor | Dual.

Its options also make the published networks: DiT, SiT and REPA's SiT (`embeddings="dit"`), MeanFlow's (the same with two
times), LightningDiT (Yao et al. 2025: `embeddings="dit", mlp="swiglu", norm="rms", rope=True`), and with a wide head DiT^DH
(Zheng et al. 2025, RAE: the last and `embeddings="gaussian"`), for latents of many channels.
"""

from __future__ import annotations

import torch
from cmt_kernels import Dual, attention, gated_residual, gelu, qk_norm, silu
from cmt_kernels.dual import add, chunks, linear_map, multiply, value
from torch import Tensor, nn

from cmt_fast.models.layers import (
    GuidanceEmbedder,
    LabelEmbedder,
    LayerNorm,
    Linear,
    RmsNorm,
    TimeEmbedder,
    as_stream,
    recomputed,
)

# size: width, depth, heads
SIZES = {"tiny": (128, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class Block(nn.Module):
    """x: (B, T, D), c: (B, D) already through silu -> (B, T, D). With c (B, T, D) each token has a modulation of its own."""

    fp8 = ("qkv", "proj", "fc1", "fc2")  # what a frozen network may multiply in fp8

    def __init__(self, width: int, heads: int, normed: bool, mlp: str = "gelu", norm: str = "layer") -> None:
        super().__init__()
        self.heads, self.gated = heads, mlp == "swiglu"
        hidden = 8 * width // 3 if self.gated else 4 * width
        self.norm1, self.norm2 = (RmsNorm(width) if norm == "rms" else LayerNorm() for _ in range(2))
        self.modulation = Linear(width, 6 * width, zero=True)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.fc1 = Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = Linear(hidden, width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) if normed else None for _ in range(2))

    def forward(self, x: Tensor | Dual, c: Tensor | Dual, cos: Tensor | None, sin: Tensor | None) -> Tensor | Dual:
        each, tokens = value(c).ndim == 3, value(x).shape[1]
        if each:  # the ops modulate a row: here a row is a token, but for attention
            x, c = by_token(x), linear_map(lambda y: y.flatten(0, 1), c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks(self.modulation(c), 6)
        h, x = self.norm1(x, shift_a, scale_a)
        qkv = linear_map(lambda y: y.unflatten(-1, (3, self.heads, -1)), self.qkv(h))
        qkv = by_image(qkv, tokens) if each else qkv
        mixed = attention(qk_norm(qkv, self.q_weight, self.k_weight, cos, sin))
        mixed = by_token(mixed) if each else mixed
        x = self.proj(mixed, lambda y, bias: gated_residual(x, y, gate_a, bias))
        h, x = self.norm2(x, shift_m, scale_m)
        y = self.fc2(self._hidden(h), lambda y, bias: gated_residual(x, y, gate_m, bias))
        return by_image(y, tokens) if each else y

    def _hidden(self, h: Tensor | Dual) -> Tensor | Dual:
        """gelu(fc1(h)), or the gated silu(a) b of [a, b] = fc1(h) (Shazeer 2020)."""
        if not self.gated:
            return self.fc1(h, gelu)
        a, b = chunks(self.fc1(h), 2)
        return multiply(silu(a), b)


def by_token(x: Tensor | Dual) -> Tensor | Dual:
    """(B, T, ...) -> (B T, 1, ...): each token a row of its own."""
    return linear_map(lambda y: y.flatten(0, 1).unsqueeze(1), x)


def by_image(x: Tensor | Dual, tokens: int) -> Tensor | Dual:
    """(B T, 1, ...) -> (B, T, ...)."""
    return linear_map(lambda y: y.reshape(-1, tokens, *y.shape[2:]), x)


class DiT(nn.Module):
    """F(x, t, r, labels): x (B, C, H, W), t, r (B,) -> (B, C, H, W).

    two_times adds an embedding of t - r (MeanFlow's average velocity); otherwise r is not read. embeddings: "cmt" for
    times and positions as this project has them, "dit" as published (256 features of a time, columns before rows), "gaussian"
    for the same positions and times by random waves. wide_head: width, depth and heads of DiT^DH's: it begins from the patches
    anew, and the transformer's tokens h are its modulation, c = silu(W silu(e + h) + b) with e the embedding of the times.
    guided: it is told a guidance scale and interval (`guide`). velocity_head: blocks of an auxiliary head, which branches
    off before as many of the last blocks and gives the velocity at (x, t) beside the output where `also` asks for it; it
    carries no tangent.
    Tangents of x, t and r must belong to the same first rows; a plain argument is a constant.
    """

    repeated = "_block"  # the method that runs a block, all of them alike: torch.compile compiles one for all

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int = 2,
        two_times: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        mlp: str = "gelu",
        norm: str = "layer",
        embeddings: str = "cmt",
        wide_head: tuple[int, int, int] | None = None,
        checkpoint_activations: bool = False,
        guided: bool = False,
        velocity_head: int | None = None,
    ) -> None:
        """Many parameters: the data's shape, and the hyperparameters as they are published."""
        super().__init__()
        self.checkpoint_activations, self.bf16_stream = checkpoint_activations, False
        if side % patch:
            raise ValueError(f"model.patch: {patch} does not divide the image side {side}")
        for key, wide, n in (("model.heads", width, heads), ("model.wide_head.heads", *(wide_head or (4, 1, 1))[::2])):
            if wide % n or (wide // n) % 4:
                raise ValueError(f"{key}: {n} heads of width {wide} are not a multiple of 4 wide")
        self.patch, self.cells, self.channels = patch, side // patch, channels
        self.embed = Linear(channels * patch**2, width)
        self.time = TimeEmbedder(width, kind=embeddings)
        self.duration = TimeEmbedder(width, kind=embeddings) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm, mlp, norm) for _ in range(depth))
        last, depth_h, heads_h = wide_head or (width, 0, heads)
        self.head_embed = Linear(channels * patch**2, last) if wide_head else None
        self.head_condition = Linear(width, last) if wide_head and last != width else None
        self.head_blocks = nn.ModuleList(Block(last, heads_h, qk_norm, mlp, norm) for _ in range(depth_h))
        self.final_norm = RmsNorm(last) if norm == "rms" else LayerNorm()
        self.final_modulation = Linear(last, 2 * last, zero=True)
        self.final = Linear(last, channels * patch**2, zero=True)
        place = positions(self.cells, width, columns_first=embeddings != "cmt")
        self.register_buffer("position", place, persistent=False)
        angles = _rope_2d(self.cells, width // heads) if rope else (None, None)
        angles += _rope_2d(self.cells, last // heads_h) if rope and wide_head else (None, None)
        for name, angle in zip(("cos", "sin", "head_cos", "head_sin"), angles):
            self.register_buffer(name, angle, persistent=False)
        self.guidance = GuidanceEmbedder(width) if guided else None
        self.branch = None if velocity_head is None else depth - velocity_head
        if velocity_head is not None:
            self.velocity_blocks = nn.ModuleList(Block(width, heads, qk_norm, mlp, norm) for _ in range(velocity_head))
            self.velocity_norm = RmsNorm(width) if norm == "rms" else LayerNorm()
            self.velocity_modulation = Linear(width, 2 * width, zero=True)
            self.velocity_final = Linear(width, channels * patch**2, zero=True)

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
        patches = linear_map(self._patchify, x)
        h = as_stream(add(self.embed(patches), self.position), self.bf16_stream)
        e = self.time(t)
        if self.duration is not None:
            e = add(e, self.duration(add(t, linear_map(torch.neg, t if r is None else r))))
        c = e if self.label is None else add(e, self.label(labels, drop))
        c = silu(c if self.guidance is None or guide is None else add(c, self.guidance(guide, value(t))))
        if self.head_embed is not None:
            c = silu(c)  # as published
        branched = None
        for i, block in enumerate(self.blocks):
            branched = value(h) if i == self.branch else branched
            h = self._block(block, h, c)
        last = self._last(h, c) if self.head_embed is None else self._head(patches, h, e)
        out = linear_map(self._unpatchify, self.final(last))
        return (out, self._velocity(value(h) if branched is None else branched, value(c))) if also else out

    def _velocity(self, h: Tensor, c: Tensor) -> Tensor:
        """The auxiliary head's output, from the stream where it branches off. (B, C, H, W)."""
        for block in self.velocity_blocks:
            h = value(self._block(block, h, c))
        h, _ = self.velocity_norm(h, *chunks(self.velocity_modulation(c), 2))
        return self._unpatchify(value(self.velocity_final(h)))

    def _last(self, h: Tensor | Dual, c: Tensor | Dual) -> Tensor | Dual:
        """The norm before the last layer, modulated by c (B, D)."""
        return self.final_norm(h, *chunks(self.final_modulation(c), 2))[0]

    def _head(self, patches: Tensor | Dual, h: Tensor | Dual, e: Tensor | Dual) -> Tensor | Dual:
        """The wide head's last tokens: patches (B, T, C p p), the transformer's tokens h (B, T, D), times e (B, D)."""
        c = silu(add(linear_map(lambda y: y.unsqueeze(1), e), h))
        c = silu(c if self.head_condition is None else self.head_condition(c))
        y = as_stream(self.head_embed(patches), self.bf16_stream)
        for block in self.head_blocks:
            y = self._block(block, y, c)
        return by_image(self._last(by_token(y), linear_map(lambda x: x.flatten(0, 1), c)), self.cells**2)

    def _block(self, block: Block, x: Tensor | Dual, c: Tensor | Dual) -> Tensor | Dual:
        """One block, run again in the backward pass where activations are not to be kept."""
        cos, sin = (self.cos, self.sin) if value(c).ndim == 2 else (self.head_cos, self.head_sin)
        run = lambda x, c: block(x, c, cos, sin)
        return recomputed(run, x, c) if self.checkpoint_activations and torch.is_grad_enabled() else run(x, c)

    def _patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, C p p)."""
        b, c, n, p = x.shape[0], self.channels, self.cells, self.patch
        return x.reshape(b, c, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, c * p * p)

    def _unpatchify(self, y: Tensor) -> Tensor:
        """(B, T, C p p) -> (B, C, H, W)."""
        b, c, n, p = y.shape[0], self.channels, self.cells, self.patch
        return y.reshape(b, n, n, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, n * p, n * p)


def _axis(positions: Tensor, dim: int) -> Tensor:
    """positions: (n,) -> angles (n, dim), frequencies geometric from 1 to 1/10000."""
    return positions[:, None] * 10000.0 ** -(torch.arange(dim, dtype=torch.float64, device="cpu") / dim)


def positions(cells: int, width: int, columns_first: bool = False) -> Tensor:
    """Fixed 2-D positions, (cells^2, width) float32: half the width for rows, half for columns, sines before cosines."""
    angles = _axis(torch.arange(cells, dtype=torch.float64, device="cpu"), width // 4)
    one = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (cells, width / 2)
    rows, columns = one[:, None].expand(-1, cells, -1), one[None].expand(cells, -1, -1)
    both = (columns, rows) if columns_first else (rows, columns)
    return torch.cat(both, dim=-1).reshape(cells * cells, -1).float()


def _rope_2d(cells: int, head: int) -> tuple[Tensor, Tensor]:
    """Rotary angles of a 2-D grid: cos, sin (cells^2, head / 2)."""
    angles = _axis(torch.arange(cells, dtype=torch.float64, device="cpu"), head // 4)
    rows, columns = angles[:, None].expand(-1, cells, -1), angles[None].expand(cells, -1, -1)
    both = torch.cat((rows, columns), dim=-1).reshape(cells * cells, -1)
    return both.cos().float(), both.sin().float()
