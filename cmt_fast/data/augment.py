"""EDM's augmentation of training images, told to the network by labels so that it does not leak into samples.

Karras et al. 2022, appendix F.2, after the pipe of Karras et al. 2020 (ADA). A network that is told what was done to its
image is sampled with labels of 0, as if nothing had been. Flips, quarter turns and whole shifts move pixels as they are;
scale, rotation, stretch and fractional shifts are one affine map, read bilinearly at twice the resolution between the two
halves of a wavelet (sym6: 12 taps, orthogonal, so that a map that is the identity gives the image back).

What a row becomes is a function of (seed, stage, step, sample): neither the batch nor the ranks that share it matter. EDM pads
a batch by what its furthest row needs; every row here has all that mirrored edges give, size - 1. No number is read from a
device, so nothing waits for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cmt_kernels.philox import normal, uniform
from torch import Tensor

from cmt_fast.config.schema import Augment
from cmt_fast.diffusion.rng import TOLD, TOLD_GAUSS, Random

# the scaling filter of Daubechies' least asymmetric wavelet of 6 vanishing moments; its squares sum to 1
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)  # fmt: skip
EDGE = len(SYM6) // 4  # pixels around an output that its filter reads
TOGETHER = 1 << 24  # numbers of a padded, doubled batch that are in memory at once


class Changes(NamedTuple):
    """What was drawn for each row: 0 or false where nothing happens.

    xflip, yflip: (B,) bool; turns: (B,) int64, quarter turns; whole: (B, 2) of x and y in [-1, 1], times `translate_int_max`
    of the size; scale, aniso: (B,), standard normal; angle, along: (B,) radians, of the rotation and of the axis that is
    stretched; shift: (B, 2) of x and y, standard normal.
    """

    xflip: Tensor
    yflip: Tensor
    turns: Tensor
    whole: Tensor
    scale: Tensor
    angle: Tensor
    aniso: Tensor
    along: Tensor
    shift: Tensor

    @property
    def moved(self) -> Tensor:
        """(B,) bool: whether anything but a move of whole pixels happens to a row."""
        return (self.scale != 0) | (self.angle != 0) | (self.aniso != 0) | (self.shift != 0).any(1)


def draw(random: Random, sample: Tensor, config: Augment) -> Changes:
    """The changes of rows sample (B,), global ids, of one step. Switching one kind off leaves the draws of all others."""
    u, g = uniform(random.key(TOLD), sample, 16), normal(random.key(TOLD_GAUSS), sample, (4,))
    on = lambda i, multiplier: u[:, i] < multiplier * config.p
    given = lambda happens, w: torch.where(happens if w.ndim == 1 else happens[:, None], w, torch.zeros_like(w))
    around = lambda i: ((2 * u[:, i] - 1) * math.pi).float()
    return Changes(
        on(0, config.xflip) & (u[:, 1] < 0.5),
        on(2, config.yflip) & (u[:, 3] < 0.5),
        given(on(4, config.rotate_int), (4 * u[:, 5]).long().clamp_(max=3)),
        given(on(6, config.translate_int), (2 * u[:, 7:9] - 1).float()),
        given(on(9, config.scale), g[:, 0]),
        given(on(10, config.rotate_frac), around(11) * config.rotate_frac_max),
        given(on(12, config.aniso), g[:, 1]),
        given(u[:, 13] < config.aniso_rotate_prob, around(14)),
        given(on(15, config.translate_frac), g[:, 2:4]),
    )


def labels(changes: Changes, config: Augment, shape: tuple[int, ...]) -> Tensor:
    """What the network is told of images of `shape` (C, H, W): (B, config.labels) float32, in EDM's order, 0 for nothing."""
    c, (tx, ty) = changes, _whole(changes, config, shape)
    half = lambda *ks: torch.stack([c.turns == k for k in ks]).any(0)
    told = {
        "xflip": (c.xflip,),
        "yflip": (c.yflip,),
        "rotate_int": (half(1, 2), half(2, 3)),
        "translate_int": (tx / (shape[2] * config.translate_int_max), ty / (shape[1] * config.translate_int_max)),
        "scale": (c.scale,),
        "rotate_frac": (c.angle.cos() - 1, c.angle.sin()),
        "aniso": (c.aniso * c.along.cos(), c.aniso * c.along.sin()),
        "translate_frac": tuple(c.shift.unbind(1)),
    }
    return torch.stack([x.float() for kind in config.kinds for x in told[kind]], 1)


@torch.no_grad()
def apply(images: Tensor, changes: Changes, config: Augment) -> Tensor:
    """images: (B, C, H, W) -> the same shape, each row changed. A row to which nothing happens keeps its bits."""
    images = _blit(images, changes, config)
    if not {"scale", "rotate_frac", "aniso", "translate_frac"} & set(config.kinds):
        return images
    height, width = images.shape[2:]
    theta = _theta(changes, config, height, width).to(images.dtype)
    most = max(1, TOGETHER // (images.shape[1] * (6 * height - 4) * (6 * width - 4)))
    warped = [_warped(x, of) for x, of in zip(images.split(most), theta.split(most))]
    return torch.where(changes.moved.view(-1, 1, 1, 1), torch.cat(warped), images)


def _whole(changes: Changes, config: Augment, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whole pixels to the right and, as EDM reads rows upwards, up. (B,), (B,) float32."""
    right, up = changes.whole.unbind(1)
    most = config.translate_int_max
    return (right * (shape[2] * most)).round(), (up * (shape[1] * most)).round()


def _blit(images: Tensor, changes: Changes, config: Augment) -> Tensor:
    """Flips, quarter turns and whole shifts over mirrored edges: every pixel is one of before."""
    where = lambda happens, x: torch.where(happens.view(-1, 1, 1, 1), x, images)
    kinds, turns = config.kinds, changes.turns
    if "xflip" in kinds:
        images = where(changes.xflip, images.flip(3))
    if "yflip" in kinds:
        images = where(changes.yflip, images.flip(2))
    if "rotate_int" in kinds:
        images = where((turns == 1) | (turns == 2), images.flip(3))
        images = where((turns == 2) | (turns == 3), images.flip(2))
        images = where((turns == 1) | (turns == 3), images.transpose(2, 3))
    if "translate_int" in kinds:
        tx, ty = _whole(changes, config, tuple(images.shape[1:]))
        images = images.gather(3, _mirrored(-tx, images.shape[3])[:, None, None, :].expand(images.shape))
        images = images.gather(2, _mirrored(ty, images.shape[2])[:, None, :, None].expand(images.shape))
    return images


def _mirrored(by: Tensor, n: int) -> Tensor:
    """(B, n) int64: which of n pixels stands at each place + by, the image mirrored at the centres of its outer pixels."""
    at = torch.arange(n, device=by.device) + by.long()[:, None]
    return n - 1 - (n - 1 - at % (2 * n - 2)).abs()


def _theta(changes: Changes, config: Augment, height: int, width: int) -> Tensor:
    """(B, 2, 3) as of affine_grid, from the doubled output with its EDGE to the doubled image with its mirrored edges.

    An output's pixel comes from A x + b about the image's centre: A = R(angle)/s  R(-along) diag(1/a, a) R(along), b = -A shift.
    Doubled, half a pixel is a whole one, and centres of pixels are half of one apart: A (x + 1/2) + 2 b - 1/2.
    """
    c, row = changes, lambda *xs: torch.stack(xs, -1)
    turn = lambda w: torch.stack((row(w.cos(), -w.sin()), row(w.sin(), w.cos())), -2)
    a, s = (config.aniso_std * c.aniso).exp2(), (config.scale_std * c.scale).exp2()
    linear = turn(c.angle) / s[:, None, None]
    linear = linear @ (turn(-c.along) * row(1 / a, a)[:, None, :]) @ turn(c.along)
    size = torch.tensor((width, height), dtype=torch.float32, device=c.scale.device)
    apart = -(linear @ (c.shift * config.translate_frac_std * size)[:, :, None])[:, :, 0]
    into, out = 2 * (3 * size - 2), 2 * (size + 2 * EDGE)
    offset = (0.5 * linear.sum(2) + 2 * apart - 0.5) * 2 / into
    return torch.cat((linear * (out[None, :] / into[:, None]), offset[:, :, None]), 2)


def _warped(x: Tensor, theta: Tensor) -> Tensor:
    """(B, C, H, W) under theta: mirrored, doubled, read, halved. Sums of slices, which no setting of products rounds."""
    height, width = x.shape[2:]
    x = F.pad(x, (width - 1, width - 1, height - 1, height - 1), mode="reflect")
    x = _doubled(_doubled(x, 3), 2)
    shape = [*x.shape[:2], 2 * (height + 2 * EDGE), 2 * (width + 2 * EDGE)]
    grid = F.affine_grid(theta, shape, align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halved(_halved(x, 3), 2)


def _doubled(x: Tensor, dim: int) -> Tensor:
    """n -> 2 n along dim: y_i = sum_j h_(5 + i - 2 j) x_j, the transpose of `_halved` but for its place."""
    n, taps = x.shape[dim], len(SYM6)
    padded = F.pad(x, (3, 3) if dim == 3 else (0, 0, 3, 3))
    phases = []
    for phase in (0, 1):
        y = torch.zeros_like(x)
        for d in range(-3, 4):  # j = i // 2 - d
            if 0 <= (k := 5 + phase + 2 * d) < taps:
                y.add_(padded.narrow(dim, 3 - d, n), alpha=SYM6[k])
        phases.append(y)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def _halved(x: Tensor, dim: int) -> Tensor:
    """2 (n + 2 EDGE) -> n along dim: y_i = sum_k h_k x_(2 i + 1 + k)."""
    n = x.shape[dim] // 2 - 2 * EDGE
    every = lambda k: x[..., 1 + k : 1 + k + 2 * n : 2] if dim == 3 else x[:, :, 1 + k : 1 + k + 2 * n : 2]
    y = every(0) * SYM6[0]
    for k in range(1, len(SYM6)):
        y.add_(every(k), alpha=SYM6[k])
    return y
