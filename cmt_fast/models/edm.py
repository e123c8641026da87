"""EDM's U-Nets (Karras et al. 2022) for Tensor | Dual, with one or two times: DDPM++ and NCSN++ (Song et al. 2021) and ADM
(Dhariwal & Nichol 2021) as that paper trains them.

One network, for they differ in details: where the time shifts a block (DDPM++) or scales and shifts it (ADM), heads of
the whole width or of 64 channels, sums scaled by sqrt(1/2) or not, and how they start. NCSN++ is DDPM++ with waves of random
frequencies, kept with the weights, for the time; with a filter of four taps wherever the side changes; and with the image
itself, halved and convolved from level to level, added to what each level of the encoder begins with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from cmt_kernels import Dual, attention, dropout, fourier_embedding, label_embedding, silu
from cmt_kernels.dual import add, concatenate, linear_map, multiply, value
from torch import Tensor, nn

from cmt_fast.models.layers import Conv, GroupNorm, Linear, TimeEmbedder, in_fp32
from cmt_fast.models.unet import Place, halved, pack_heads, plan, resample, unpack_heads, walk

_SONG = {"adm": False, "width": 128, "blocks": 4, "attention": (16,), "augment": 9, "ncsnpp": False}
TAPS = (1, 3, 3, 1)  # of NCSN++'s filters
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": _SONG | {"multipliers": (2, 2, 2), "dropout": 0.13},
    "ffhq64": _SONG | {"multipliers": (1, 2, 2, 2), "dropout": 0.05},
    "afhqv2-64": _SONG | {"multipliers": (1, 2, 2, 2), "dropout": 0.25},
    "cifar10-ncsnpp": _SONG | {"multipliers": (2, 2, 2), "dropout": 0.13, "ncsnpp": True},
    "ffhq64-ncsnpp": _SONG | {"multipliers": (1, 2, 2, 2), "dropout": 0.05, "ncsnpp": True},
    "afhqv2-64-ncsnpp": _SONG | {"multipliers": (1, 2, 2, 2), "dropout": 0.25, "ncsnpp": True},
    "imagenet64": {
        "adm": True,
        "width": 192,
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (32, 16, 8),
        "augment": 0,
        "ncsnpp": False,
        "dropout": 0.1,
    },
}


def start(layer: nn.Module, adm: bool, gain: float = 1.0) -> None:
    """Fresh weights: DDPM++'s are Xavier-uniform, times gain, with biases 0; ADM's are torch's own. A gain of 0 is 0."""
    if adm and gain:
        (nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear).reset_parameters(layer)
        return
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _frequencies(n: int, adm: bool, random: bool) -> Tensor:
    """(n,) of a time's waves: from 1 down to 1/10000, or random, 16 N(0, 1) turns (of 2 pi) a unit of time."""
    if random:
        return 16 * torch.randn(n)
    return (1 / 10000) ** (torch.arange(n, dtype=torch.float32) / (n - (0 if adm else 1)))


class LabelLayer(nn.Module):
    """labels: (B,) in [0, classes] -> (B, D): a linear layer of scale times one-hot labels; `classes` is the null class.

    The null class, and a label that is dropped, is a row of zeros: the bias alone.
    """

    def __init__(self, classes: int, width: int, adm: bool) -> None:
        super().__init__()
        self.scale = 1.0 if adm else math.sqrt(classes)
        self.weight = nn.Parameter(torch.randn(width, classes))
        self.bias = None if adm else nn.Parameter(torch.zeros(width))
        if not adm:
            nn.init.xavier_uniform_(self.weight)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        y = label_embedding(labels, F.pad(self.weight.t() * self.scale, (0, 0, 0, 1)), drop)
        return y if self.bias is None else y + self.bias


class Block(nn.Module):
    """x: (B, C, H, W), emb: (B, D), seeds: (B, 2) | None -> (B, C', H', W'): a residual branch, then attention."""

    def __init__(self, place: Place, emb: int, adm: bool, drop: float, taps: tuple[int, ...] = (1, 1)) -> None:
        """taps: of the filter that changes the side."""
        super().__init__()
        self.taps = taps
        c_in, c, eps = place.inputs, place.outputs, 1e-5 if adm else 1e-6
        self.resample, self.p, self.adm = place.resample, drop, adm
        self.scale = 1.0 if adm else math.sqrt(0.5)
        self.heads = (c // 64 if adm else 1) if place.attention else 0
        projects = c_in != c or (not adm and place.resample != "keep")
        self.norm1, self.norm2 = GroupNorm(c_in, eps), GroupNorm(c, eps)
        self.conv1, self.conv2 = Conv(c_in, c, 3), Conv(c, c, 3)
        self.affine = Linear(emb, 2 * c if adm else c)
        self.skip = Conv(c_in, c, 1) if projects else None
        self.norm3 = GroupNorm(c, eps) if self.heads else None
        self.qkv = Conv(c, 3 * c, 1) if self.heads else None
        self.proj = Conv(c, c, 1) if self.heads else None
        small = 0.0 if adm else 1e-5
        gains = ((self.conv1, 1.0), (self.affine, 1.0), (self.skip, 1.0), (self.conv2, small), (self.proj, small))
        for layer, gain in (*gains, (self.qkv, math.sqrt(0.2))):
            if layer is not None:
                start(layer, adm, gain)

    def forward(self, x: Tensor | Dual, emb: Tensor | Dual, seeds: Tensor | None) -> Tensor | Dual:
        y = self.conv1(resample(silu(self.norm1(x)), self.resample, self.taps))
        params = linear_map(lambda p: p[:, :, None, None].to(value(y).dtype), self.affine(emb))
        if self.adm:
            scale, shift = (linear_map(lambda p, i=i: p.chunk(2, dim=1)[i], params) for i in (0, 1))
            y = add(multiply(self.norm2(y), add(scale, value(y).new_ones(()))), shift)
        else:
            y = self.norm2(add(y, params))
        y = silu(y)
        if seeds is not None and self.p:
            y = dropout(y, seeds, self.p)
        x = resample(x, self.resample, self.taps)
        x = self._sum(self.conv2(y), x if self.skip is None else self.skip(x))
        if self.heads:
            qkv = pack_heads(self.qkv(self.norm3(x)), self.heads)
            x = self._sum(self.proj(unpack_heads(attention(qkv), value(x).shape[2])), x)
        return x

    def _sum(self, a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
        total = add(a, b)
        return total if self.scale == 1 else linear_map(lambda y: y * self.scale, total)


class Pyramid(nn.Module):
    """image: (B, C, H, W) -> (B, E, H/2, W/2): convolved over two pixels more than it has, then filtered and halved.

    NCSN++'s way down for the image. EDM adds the bias last; the filter, whose taps sum to 1, leaves it as it is.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Conv(c_in, c_out, 3)
        start(self.conv, adm=False)

    def forward(self, image: Tensor | Dual) -> Tensor | Dual:
        wide = self.conv(linear_map(lambda y: F.pad(y, (1, 1, 1, 1)), image))
        return linear_map(lambda y: halved(y, TAPS, 0), wide)


class Edm(nn.Module):
    """F(x, t, r, labels): x (B, C, H, W), t, r (B,) -> (B, C, H, W); t is c_noise under a Denoiser.

    ncsnpp: NCSN++ in the place of DDPM++. two_times adds an embedding of t - r (an average velocity); otherwise r is not read.
    Classes 0: unconditional. seeds: (B, dropouts, 2) draws the dropout of a training step; None: no dropout.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        adm: bool,
        width: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        ncsnpp: bool = False,
        augment: int = 0,
        dropout: float = 0.0,
        two_times: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        """Many parameters: the data's shape, and the hyperparameters as they are published."""
        super().__init__()
        widths = tuple(width * m for m in multipliers)
        first, emb = widths[0] if adm else width, 4 * width
        if width % (64 if adm else 4):
            raise ValueError(f"model.width: {width} is not a multiple of {64 if adm else 4}")
        encoder, decoder = plan(side, first, widths, blocks, lambda s: s in attention, sparse=not adm)
        self.adm, self.classes, self.checkpoint_activations = adm, classes, checkpoint_activations
        self.dropouts = len(encoder + decoder) if dropout else 0
        waves = 2 * width if ncsnpp else width
        self.ncsnpp = ncsnpp
        self.register_buffer("frequency", _frequencies(waves // 2, adm, ncsnpp), persistent=ncsnpp)
        self.augment = Linear(augment, waves, bias=False, zero=adm) if augment else None
        self.layer1, self.layer2 = Linear(waves, emb), Linear(emb, emb)
        self.duration = TimeEmbedder(emb) if two_times else None
        self.label = LabelLayer(classes, emb if adm else waves, adm) if classes else None
        self.conv = Conv(channels, first, 3)
        taps = TAPS if ncsnpp else (1, 1)
        make = lambda places: nn.ModuleDict({p.name: Block(p, emb, adm, dropout, taps) for p in places})
        self.encoder, self.decoder = make(encoder), make(decoder)
        down = [p for p in encoder if p.resample == "halve"] if ncsnpp else []
        seen = (channels, *(p.outputs for p in down))
        self.pyramid = nn.ModuleDict({p.name: Pyramid(c, p.outputs) for p, c in zip(down, seen)}) if down else None
        self.out_norm, self.out = GroupNorm(widths[0], 1e-5 if adm else 1e-6), Conv(widths[0], channels, 3)
        for layer, gain in ((self.layer1, 1.0), (self.layer2, 1.0), (self.conv, 1.0), (self.out, 0.0 if adm else 1e-5)):
            start(layer, adm, gain)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor | Dual:
        """augment: (B, n) labels of a data augmentation, None for rows as they are; everything else as the class says."""
        emb = self._embed(t, r, labels, drop, augment)
        image = x

        def with_image(name: str, y: Tensor | Dual) -> Tensor | Dual:
            nonlocal image
            if self.pyramid is not None and name in self.pyramid:
                y = image = linear_map(lambda z: z * math.sqrt(0.5), add(y, self.pyramid[name](image)))
            return y

        after = with_image if self.pyramid is not None else None
        join, again = concatenate, self.checkpoint_activations
        y = walk(self.conv(x), emb, self.encoder, self.decoder, join, seeds, again, after)
        return self.out(silu(self.out_norm(y)))

    def _embed(
        self,
        t: Tensor | Dual,
        r: Tensor | Dual | None,
        labels: Tensor | None,
        drop: Tensor | None,
        augment: Tensor | None,
    ) -> Tensor | Dual:
        """(B, D), in fp32 whatever autocast says. DDPM++ reads its waves as sines, cosines and its labels beside them."""
        with in_fp32(t):
            label = None
            if self.label is not None:
                null = torch.full_like(value(t), self.classes, dtype=torch.int64)
                label = self.label(null if labels is None else labels, drop)
            emb = fourier_embedding(t, 2 * math.pi * self.frequency if self.ncsnpp else self.frequency)
            if not self.adm:
                emb = linear_map(lambda y: y.roll(y.shape[1] // 2, dims=1), emb)
                emb = emb if label is None else add(emb, label)
            if self.augment is not None and augment is not None:
                emb = add(emb, self.augment(augment))
            emb = self.layer2(silu(self.layer1(emb)))
            if self.adm and label is not None:
                emb = add(emb, label)
            if self.duration is not None:
                emb = add(emb, self.duration(add(t, linear_map(torch.neg, t if r is None else r))))
            return silu(emb)
