"""Random augmentation that gradients pass through: the same of two images, so that equal images stay equal.

The families of Karras et al. 2020 (ADA) that mean something on latents, each always on: flips and whole shifts;
scale, rotation, stretch, fractional shifts; brightness, contrast, and spread of the channels about their mean;
noise; cutout. Left out are those of RGB or of pixels: hue, luma flip and the image filters. Everything that moves points
is one affine map, read by bilinear interpolation with mirrored edges. Numbers depend on (seed, stage, step, row).
The backward pass of that read adds atomically on CUDA, so there the last bits of a run may differ from its repetition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cmt_kernels.philox import normal, uniform
from torch import Tensor

from cmt_fast.diffusion.rng import AUGMENT, AUGMENT_GAUSS, AUGMENT_NOISE, Random

# of ADA: standard deviations of log2 scale and stretch, of shifts in image sizes, of log2 contrast and saturation
SCALE, STRETCH, SHIFT, WHOLE_SHIFT = 0.2, 0.2, 0.125, 0.125
BRIGHTNESS, CONTRAST, SATURATION, NOISE, CUTOUT = 0.2, 0.5, 1.0, 0.1, 0.5


class Augmentation(NamedTuple):
    """What was drawn for each row of a batch: all that an image's change depends on.

    points: (B, 2, 3), from an output's coordinates in [-1, 1] to the input's; spread, gain, shift: (B,), of the channels
    about their mean, of all and what is added; noise: (B, C, H, W), added; keep: (B, 1, H, W), 0 where a box is cut out.
    """

    points: Tensor
    spread: Tensor
    gain: Tensor
    shift: Tensor
    noise: Tensor
    keep: Tensor


def draw(random: Random, sample: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Augmentation:
    """The change of each of the rows sample (B,), global ids, that are images of shape (C, H, W)."""
    _, height, width = shape
    u = uniform(random.key(AUGMENT), sample, 6).to(dtype)
    g = normal(random.key(AUGMENT_GAUSS), sample, (8,)).to(dtype)
    noise = normal(random.key(AUGMENT_NOISE), sample, shape).to(dtype) * (NOISE * g[:, 7].abs()).view(-1, 1, 1, 1)
    spread, gain = torch.exp2(SATURATION * g[:, 4]), torch.exp2(CONTRAST * g[:, 5])
    points, keep = _affine(u, g, height, width), _cutout(u, height, width)
    return Augmentation(points, spread, gain, BRIGHTNESS * g[:, 6], noise, keep)


def augment(images: Tensor, copies: int, drawn: Augmentation) -> Tensor:
    """images: (copies B, C, H, W), row i of every copy changed alike -> the same shape."""
    assert len(drawn.points) * copies == len(images)
    again = lambda x: x.repeat(copies, *[1] * (x.ndim - 1))
    grid = F.affine_grid(again(drawn.points), list(images.shape), align_corners=False)
    x = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    column = lambda v: again(v).view(-1, 1, 1, 1)
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * column(drawn.spread)
    x = x * column(drawn.gain) + column(drawn.shift)
    return (x + again(drawn.noise)) * again(drawn.keep)


def _affine(u: Tensor, g: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3): from an output's coordinates in [-1, 1] to the input's."""
    flip = 2 * (u[:, 0] >= 0.5).to(u.dtype) - 1
    angle = (2 * u[:, 1] - 1) * math.pi
    cos, sin = torch.cos(angle), torch.sin(angle)
    size = torch.exp2(SCALE * g[:, 0])
    stretch = torch.exp2(STRETCH * g[:, 1])
    whole = torch.stack(
        [torch.round((2 * u[:, 2 + i] - 1) * WHOLE_SHIFT * n) / n for i, n in enumerate((width, height))], 1
    )
    shift = 2 * (whole + SHIFT * g[:, 2:4])
    turn = torch.stack(
        (
            torch.stack((cos * flip * size * stretch, -sin * size / stretch), 1),
            torch.stack((sin * flip * size * stretch, cos * size / stretch), 1),
        ),
        1,
    )
    return torch.cat((turn, shift[:, :, None]), 2)


def _cutout(u: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W): 0 in a box of CUTOUT the image's sides about a random centre, 1 elsewhere."""
    y, x = ((torch.arange(n, device=u.device, dtype=u.dtype) + 0.5) / n for n in (height, width))
    inside = lambda at, centre: (at[None] - centre[:, None]).abs() < CUTOUT / 2
    box = inside(y, u[:, 4])[:, :, None] & inside(x, u[:, 5])[:, None, :]
    return (~box).to(u.dtype)[:, None]
