"""What the U-Nets share: the order and the widths of their blocks, the walk through them, resampling.

An encoder halves the side from level to level and remembers what every block gave; a decoder takes these back, last
first, and doubles. Blocks are modules called `block(x, emb, seeds)`, named as in the published networks, `64x64_block0`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cmt_kernels import Dual
from cmt_kernels.dual import linear_map
from torch import Tensor, nn

from cmt_fast.models.layers import recomputed


class Place(NamedTuple):
    """One block: its name, channels in and out, what it does to the side ("keep", "halve", "double"), attention."""

    name: str
    inputs: int
    outputs: int
    resample: str = "keep"
    attention: bool = False

    @property
    def side(self) -> int:
        """Of what the block gives, as its name says."""
        return int(self.name.partition("x")[0])


def plan(
    side: int, first: int, widths: tuple[int, ...], blocks: int, attends: Callable[[int], bool], sparse: bool = False
) -> tuple[list[Place], list[Place]]:
    """Encoder (after its first convolution, to `first` channels) and decoder of `widths`, one for each level.

    attends(side): whether blocks of that side have attention; `sparse`: in the decoder only the last one of a level.
    Raises ValueError when the levels do not divide the side.
    """
    if side % 2 ** (len(widths) - 1):
        raise ValueError(f"model.multipliers: {len(widths)} levels need a side divisible by {2 ** (len(widths) - 1)}")
    encoder, decoder, width, skips = [], [], first, [first]
    for level, outputs in enumerate(widths):
        here = side >> level
        if level:
            encoder.append(Place(f"{here}x{here}_down", width, width, "halve"))
            skips.append(width)
        for i in range(blocks):
            encoder.append(Place(f"{here}x{here}_block{i}", width, outputs, attention=attends(here)))
            width = outputs
            skips.append(width)
    for level, outputs in reversed(list(enumerate(widths))):
        here = side >> level
        if level == len(widths) - 1:
            decoder.append(Place(f"{here}x{here}_in0", width, width, attention=True))
            decoder.append(Place(f"{here}x{here}_in1", width, width))
        else:
            decoder.append(Place(f"{here}x{here}_up", width, width, "double"))
        for i in range(blocks + 1):
            attention = attends(here) and (i == blocks or not sparse)
            decoder.append(Place(f"{here}x{here}_block{i}", width + skips.pop(), outputs, attention=attention))
            width = outputs
    return encoder, decoder


def walk(
    x: Tensor | Dual,
    emb: Tensor | Dual,
    encoder: nn.ModuleDict,
    decoder: nn.ModuleDict,
    join: Callable,
    seeds: Tensor | None,
    checkpoint_activations: bool,
    after: Callable | None = None,
) -> Tensor | Dual:
    """x: (B, C, H, W) after the first convolution, emb: (B, D) -> the last block's (B, C', H, W).

    join(x, skip): how a decoder's block takes its skip. after(name, x): what becomes of what an
    encoder's block of this name gave. seeds: (B, blocks, 2) of the dropout in each block, or None.
    Where activations are not kept, each block runs again in the backward pass, with the same seeds.
    """
    skips, count = [x], 0

    def call(block: nn.Module, x: Tensor | Dual) -> Tensor | Dual:
        nonlocal count
        own = None if seeds is None else seeds[:, count]
        count += 1
        run = lambda x, emb: block(x, emb, own)
        return recomputed(run, x, emb) if checkpoint_activations and torch.is_grad_enabled() else run(x, emb)

    for name, block in encoder.items():
        x = call(block, x)
        x = after(name, x) if after else x
        skips.append(x)
    for name, block in decoder.items():
        x = call(block, join(x, skips.pop()) if "block" in name else x)
    return x


def resample(x: Tensor | Dual, how: str, taps: tuple[int, ...] = (1, 1)) -> Tensor | Dual:
    """(B, C, H, W): "keep", "halve" by means of 2 x 2 pixels, "double" by repeating pixels.

    taps: of an even filter that is wider than two pixels; "halve" and "double" then read zeros beyond the edges.
    """
    if len(taps) > 2 and how != "keep":
        pad = len(taps) // 2 - 1
        return linear_map(lambda y: (halved if how == "halve" else _doubled)(y, taps, pad), x)
    if how == "halve":
        return linear_map(lambda y: F.avg_pool2d(y, 2), x)
    return linear_map(lambda y: F.interpolate(y, scale_factor=2, mode="nearest"), x) if how == "double" else x


def halved(x: Tensor, taps: tuple[int, ...], pad: int) -> Tensor:
    """Every other one of the means of x (B, C, H, W) weighted by taps along both sides, beyond `pad` zeros around it."""
    return F.conv2d(x, _filter(x, taps), stride=2, padding=pad, groups=x.shape[1])


def _doubled(x: Tensor, taps: tuple[int, ...], pad: int) -> Tensor:
    """x (B, C, H, W) spread by taps over twice the pixels a side: the transpose of `halved`, times 4."""
    return F.conv_transpose2d(x, 4 * _filter(x, taps), stride=2, padding=pad, groups=x.shape[1])


def _filter(x: Tensor, taps: tuple[int, ...]) -> Tensor:
    f = torch.stack([x.new_full((), k) for k in taps])
    return (f[:, None] * f / sum(taps) ** 2).expand(x.shape[1], 1, -1, -1)


def pack_heads(qkv: Tensor | Dual, heads: int) -> Tensor | Dual:
    """(B, 3 C, H, W), channels in the order head, width, (q, k, v), -> (B, H W, 3, heads, C / heads) for `attention`.

    Copied into that order: norms and kernels read a head's numbers side by side.
    """
    return linear_map(lambda y: y.flatten(2).unflatten(1, (heads, -1, 3)).permute(0, 4, 3, 1, 2).contiguous(), qkv)


def unpack_heads(y: Tensor | Dual, side: int) -> Tensor | Dual:
    """(B, H W, C) from `attention` -> (B, C, H, W)."""
    return linear_map(lambda z: z.transpose(1, 2).unflatten(2, (side, -1)), y)
