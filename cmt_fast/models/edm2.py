"""The EDM2 U-Net (Karras et al. 2024, configuration G) for Tensor | Dual, with one or two times.

Every layer preserves the expected magnitude of its activations: weights have unit length, sums and joins are scaled,
nothing is normalised by data or has a bias. Two operations keep that so. `constrain` puts stored weights back to unit
length after each optimizer step (eq. 66), so that the learning rate alone says how fast they turn; the forward divides
by the length again (eq. 47), which makes the gradient tangential and serves averaged weights, whose length is below 1.
`fold` does that division once and for all for a frozen network.

Images lie channels-last in memory from the first convolution on, and so do the weights that multiply them: what stands between
two convolutions reads the channels of a pixel as a row, and a GPU's fast convolutions take no other layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from cmt_kernels import (
    Dual,
    attention,
    conv2d,
    dropout,
    fourier_embedding,
    label_embedding,
    linear,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
    transforms,
    unit_weight,
    use,
)
from cmt_kernels.dual import add, concatenate, linear_map, value
from torch import Tensor, nn

from cmt_fast.models.layers import in_fp32
from cmt_fast.models.unet import Place, pack_heads, plan, resample, unpack_heads, walk

# size: width, dropout of the published ImageNet-512 and ImageNet-64 networks
SIZES = {"XS": (128, 0.0), "S": (192, 0.0), "M": (256, 0.1), "L": (320, 0.1), "XL": (384, 0.1), "XXL": (448, 0.1)}
BALANCE = 0.3  # share of the residual branch, and of attention, in a magnitude-preserving sum
LIMIT = 256.0  # activations are clipped to it
EPS = 1e-4


def channels_last(x: Tensor) -> Tensor:
    """The same numbers (B, C, H, W), channels-last in memory."""
    return x if transforms.active() else x.contiguous(memory_format=torch.channels_last)  # vmap knows no layouts


class MPLayer(nn.Module):
    """y = W x/|W|, row by row, and no bias: a linear layer (kernel 0, x: (..., D)) or a convolution (x: (B, D, H, W))."""

    def __init__(self, d_in: int, d_out: int, kernel: int = 0) -> None:
        super().__init__()
        shape = (d_out, d_in, kernel, kernel) if kernel else (d_out, d_in)
        with use("reference"):  # the same first weights whatever kernels a machine has, and drawn late (deferred.py)
            self.weight = nn.Parameter(unit_weight(torch.randn(shape), eps=EPS))
        self.folded = False

    @torch.no_grad()
    def constrain(self) -> None:
        """Put the stored weight back to unit magnitude, in place; what an engine does after an optimizer step."""
        self.weight.copy_(unit_weight(self.weight, eps=EPS))

    @torch.no_grad()
    def fold(self) -> None:
        """Hold the weight that the forward multiplies by, in memory of its own: for a network that is not trained on."""
        if not self.folded:
            with use("reference"):  # the same bits on every machine, and in what is exported
                self.weight = nn.Parameter(self.scaled(), requires_grad=False)
            self.folded = True

    def scaled(self) -> Tensor:
        """What multiplies x: rows of length 1, of a convolution channels-last and in the dtype that autocast would cast to."""
        w = self.weight
        if self.folded:
            return w
        low = w.ndim == 4 and not w.is_meta and w.dtype == torch.float32 and torch.is_autocast_enabled(w.device.type)
        dtype = torch.get_autocast_dtype(w.device.type) if low else None
        return unit_weight(w, 1 / math.sqrt(w[0].numel()), w.ndim == 4, dtype, EPS)

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        w = self.scaled()
        return linear(x, w) if w.ndim == 2 else conv2d(x, w)


class MPLabel(MPLayer):
    """labels: (B,) in [0, classes] -> (B, width); `classes`, or a label that is dropped, is the null class and gives 0."""

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        w = self.scaled()
        return label_embedding(labels, F.pad(w.t() * math.sqrt(w.shape[1]), (0, 0, 0, 1)), drop)


class MPFourier(nn.Module):
    """t: (B,) -> (B, n): sqrt(2) cos(frequency t + phase), with frequencies ~ 2 pi N(0, 1) drawn once and kept."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * math.pi * torch.randn(n))
        self.register_buffer("phase", 2 * math.pi * torch.rand(n))

    def forward(self, t: Tensor | Dual) -> Tensor | Dual:
        return fourier_embedding(t, self.frequency, self.phase)


class LogVariance(nn.Module):
    """c_noise: (B,) -> u (B,), the log of the expected loss at that noise: weighs pre-training's loss (eq. 21)."""

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.fourier, self.out = MPFourier(features), MPLayer(features, 1)

    def forward(self, c_noise: Tensor) -> Tensor:
        with in_fp32(c_noise):
            return self.out(self.fourier(c_noise))[:, 0]


class Block(nn.Module):
    """x: (B, C, H, W), emb: (B, D), seeds: (B, 2) | None -> (B, C', H', W'): a residual branch, then attention."""

    def __init__(self, place: Place, encodes: bool, emb: int, head: int, drop: float) -> None:
        super().__init__()
        c_in, c = place.inputs, place.outputs
        self.resample, self.encodes, self.p = place.resample, encodes, drop
        self.heads = c // head if place.attention else 0
        self.gain = nn.Parameter(torch.zeros([]))
        self.emb = MPLayer(emb, c)
        self.conv1 = MPLayer(c if encodes else c_in, c, 3)
        self.conv2 = MPLayer(c, c, 3)
        self.skip = MPLayer(c_in, c, 1) if c_in != c else None
        self.qkv = MPLayer(c, 3 * c, 1) if self.heads else None
        self.proj = MPLayer(c, c, 1) if self.heads else None

    def forward(self, x: Tensor | Dual, emb: Tensor | Dual, seeds: Tensor | None) -> Tensor | Dual:
        x = resample(x, self.resample)
        if self.encodes:
            x = pixel_norm(x if self.skip is None else self.skip(x), 1, EPS)
        y, x = mp_silu(x, also_x=True)
        y = self.conv1(y)
        y = mp_silu(y, linear_map(lambda c: (c * self.gain).to(value(y).dtype), self.emb(emb)))
        if seeds is not None and self.p:
            y = dropout(y, seeds, self.p)
        y = self.conv2(y)
        if not self.encodes and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, BALANCE, None if self.heads else LIMIT)
        if self.heads:
            qkv = pixel_norm(pack_heads(self.qkv(x), self.heads), -1, EPS)
            x = mp_sum(x, self.proj(unpack_heads(attention(qkv), value(x).shape[2])), BALANCE, LIMIT)
        return x


class Edm2(nn.Module):
    """F(x, t, r, labels): x (B, C, H, W), t, r (B,) -> (B, C, H, W); t is c_noise under a Denoiser.

    two_times adds features of t - r (an average velocity); otherwise r is not read. Classes 0: unconditional.
    seeds: (B, dropouts, 2) draws the dropout of a training step; None: no dropout.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        width: int,
        multipliers: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (16, 8),
        head: int = 64,
        dropout: float = 0.0,
        dropout_max_side: int | None = None,
        two_times: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        """Many parameters: the data's shape, and the hyperparameters as they are published.

        dropout_max_side: the largest side whose blocks drop (ECT's `dropout_res`); None: all of them, as in EDM2.
        """
        super().__init__()
        widths = tuple(width * m for m in multipliers)
        encoder, decoder = plan(side, widths[0], widths, blocks, lambda s: s in attention)
        narrow = [p for p in encoder + decoder if p.attention and p.outputs % head]
        if narrow:
            raise ValueError(f"model.head: heads of width {head} do not divide {narrow[0].outputs} channels")
        self.classes, self.checkpoint_activations = classes, checkpoint_activations
        rate = lambda p: dropout if dropout_max_side is None or p.side <= dropout_max_side else 0.0
        self.dropouts = len(encoder + decoder) if any(map(rate, encoder + decoder)) else 0
        emb = max(widths)
        self.fourier = MPFourier(widths[0])
        self.noise = MPLayer(widths[0], emb)
        self.duration = MPLayer(widths[0], emb) if two_times else None
        self.label = MPLabel(classes, emb) if classes else None
        self.conv = MPLayer(channels + 1, widths[0], 3)
        make = lambda places, encodes: nn.ModuleDict({p.name: Block(p, encodes, emb, head, rate(p)) for p in places})
        self.encoder, self.decoder = make(encoder, True), make(decoder, False)
        self.out = MPLayer(widths[0], channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.log_variance = LogVariance()

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor | Dual:
        emb = self._embed(t, r, labels, drop)
        x = concatenate(x, torch.ones_like(value(x)[:, :1]))  # the channel of ones stands in for biases
        x = self.conv(linear_map(channels_last, x))
        x = walk(x, emb, self.encoder, self.decoder, mp_cat, seeds, self.checkpoint_activations)
        return linear_map(lambda y: y * self.out_gain, self.out(x))

    def _embed(
        self, t: Tensor | Dual, r: Tensor | Dual | None, labels: Tensor | None, drop: Tensor | None
    ) -> Tensor | Dual:
        """(B, D), in fp32 whatever autocast says."""
        with in_fp32(t):
            emb = self.noise(self.fourier(t))
            if self.duration is not None:
                span = add(t, linear_map(torch.neg, t if r is None else r))
                emb = mp_sum(emb, self.duration(self.fourier(span)))
            if self.label is not None:
                null = torch.full_like(value(t), self.classes, dtype=torch.int64)
                emb = mp_sum(emb, self.label(null if labels is None else labels, drop))
            return mp_silu(emb)
