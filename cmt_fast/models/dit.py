"""The diffusion transformer (Peebles & Xie 2023) with adaLN-zero, one or two times, for Tensor | Dual.

Its options also make the published networks: DiT, SiT and REPA's SiT (`embeddings="dit"`), MeanFlow's (the same with two
times), LightningDiT (Yao et al. 2025: `embeddings="dit", mlp="swiglu", norm="rms", rope=True`).
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
    """x: (B, T, D), c: (B, D) already through silu -> (B, T, D)."""

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
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks(self.modulation(c), 6)
        h, x = self.norm1(x, shift_a, scale_a)
        qkv = linear_map(lambda y: y.unflatten(-1, (3, self.heads, -1)), self.qkv(h))
        mixed = attention(qk_norm(qkv, self.q_weight, self.k_weight, cos, sin))
        x = self.proj(mixed, lambda y, bias: gated_residual(x, y, gate_a, bias))
        h, x = self.norm2(x, shift_m, scale_m)
        return self.fc2(self._hidden(h), lambda y, bias: gated_residual(x, y, gate_m, bias))

    def _hidden(self, h: Tensor | Dual) -> Tensor | Dual:
        """gelu(fc1(h)), or the gated silu(a) b of [a, b] = fc1(h) (Shazeer 2020)."""
        if not self.gated:
            return self.fc1(h, gelu)
        a, b = chunks(self.fc1(h), 2)
        return multiply(silu(a), b)


class DiT(nn.Module):
    """F(x, t, r, labels): x (B, C, H, W), t, r (B,) -> (B, C, H, W).

    two_times adds an embedding of t - r (MeanFlow's average velocity); otherwise r is not read. embeddings: "cmt" for
    times and positions as this project has them, "dit" as published (256 features of a time, columns before rows).
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
        checkpoint_activations: bool = False,
        guided: bool = False,
        velocity_head: int | None = None,
    ) -> None:
        """Many parameters: the data's shape, and the hyperparameters as they are published."""
        super().__init__()
        published = embeddings == "dit"
        self.checkpoint_activations, self.bf16_stream = checkpoint_activations, False
        if side % patch:
            raise ValueError(f"model.patch: {patch} does not divide the image side {side}")
        if width % heads or (width // heads) % 4:
            raise ValueError(f"model.heads: {heads} heads of width {width} are not a multiple of 4 wide")
        self.patch, self.cells, self.channels = patch, side // patch, channels
        self.embed = Linear(channels * patch**2, width)
        self.time = TimeEmbedder(width, published=published)
        self.duration = TimeEmbedder(width, published=published) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm, mlp, norm) for _ in range(depth))
        self.final_norm = RmsNorm(width) if norm == "rms" else LayerNorm()
        self.final_modulation = Linear(width, 2 * width, zero=True)
        self.final = Linear(width, channels * patch**2, zero=True)
        self.guidance = GuidanceEmbedder(width) if guided else None
        self.branch = None if velocity_head is None else depth - velocity_head
        if velocity_head is not None:
            self.head_blocks = nn.ModuleList(Block(width, heads, qk_norm, mlp, norm) for _ in range(velocity_head))
            self.head_norm = RmsNorm(width) if norm == "rms" else LayerNorm()
            self.head_modulation = Linear(width, 2 * width, zero=True)
            self.head_final = Linear(width, channels * patch**2, zero=True)
        self.register_buffer("position", positions(self.cells, width, columns_first=published), persistent=False)
        cos, sin = _rope_2d(self.cells, width // heads) if rope else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

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
        h = as_stream(add(self.embed(linear_map(self._patchify, x)), self.position), self.bf16_stream)
        c = self.time(t)
        if self.duration is not None:
            c = add(c, self.duration(add(t, linear_map(torch.neg, t if r is None else r))))
        if self.label is not None:
            c = add(c, self.label(labels, drop))
        if self.guidance is not None:
            c = add(c, self.guidance(guide, value(t)))
        c, branched = silu(c), None
        for i, block in enumerate(self.blocks):
            branched = value(h) if i == self.branch else branched
            h = self._block(block, h, c)
        last, _ = self.final_norm(h, *chunks(self.final_modulation(c), 2))
        out = linear_map(self._unpatchify, self.final(last))
        return (out, self._velocity(value(h) if branched is None else branched, value(c))) if also else out

    def _velocity(self, h: Tensor, c: Tensor) -> Tensor:
        """The auxiliary head's output, from the stream where it branches off. (B, C, H, W)."""
        for block in self.head_blocks:
            h = value(self._block(block, h, c))
        h, _ = self.head_norm(h, *chunks(self.head_modulation(c), 2))
        return self._unpatchify(value(self.head_final(h)))

    def _block(self, block: Block, x: Tensor | Dual, c: Tensor | Dual) -> Tensor | Dual:
        """One block, run again in the backward pass where activations are not to be kept."""
        run = lambda x, c: block(x, c, self.cos, self.sin)
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
