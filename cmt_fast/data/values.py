"""Whether numbers can be what training expects: pixels in [-1, 1], latents of a standard deviation near 0.5 or 1.

Rules, wide enough that data which are dark, do not fill their range, or have a scale of their own kind pass:

| numbers | refused where |
|---|---|
| any | a channel's std is below half a level of 255, or below 1/100 of the largest channel's |
| as networks see them | lowest from -0.1 to 0.1 and highest from 0.5 to 1.2 (0..1 for -1..1); never negative, above 16 (0..255) |
| as networks see them | std above 2.5; with other than 1 or 3 channels, which images have, std below 0.2 |
| latents as an autoencoder gives them | never negative and at most 1; std below 0.3 or above 16 |

The std is that of all channels, sqrt(mean of their variances). Known latents: Stable Diffusion's 4 as they are, 0.7 to 1 times
their factor of 0.18215, 0.13 where it is applied twice. Of other autoencoders the published factors, which bring the std to 1,
go from 1.5305 (Stable Diffusion 3) to 0.13025 (SDXL): a std of 0.65 to 7.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

LEVEL = 1 / 255  # half the distance between two levels of an 8-bit image in [-1, 1]
RATIO = 100
SEEN = (0.2, 2.5)
RAW = (0.3, 16.0)
IMAGES = (1, 3)  # channels of images, which may be as dark and flat as they like


class Spread(NamedTuple):
    """Lowest and highest number; mean and std (C,) channel by channel."""

    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def all(self) -> float:
        """The standard deviation of all channels."""
        return math.sqrt(sum(s * s for s in self.std) / len(self.std))

    def text(self) -> str:
        """All of it in a few words, of the first eight channels."""
        listed = lambda values: ", ".join(f"{v:.3g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
        reach = f"values from {self.low:.4g} to {self.high:.4g}, " if math.isfinite(self.low) else ""
        return f"{reach}mean {listed(self.mean)} and std {listed(self.std)} by channel"


def spread(parts: Iterable[np.ndarray]) -> Spread:
    """Of rows in parts, each (B, C, ...); one of them at least. Numbers that are not finite end as such."""
    low, high, count, first, second, shift = math.inf, -math.inf, 0, 0.0, 0.0, None
    for part in parts:
        x = np.moveaxis(part.reshape(*part.shape[:2], -1), 1, 0).reshape(part.shape[1], -1).astype(np.float64)
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        shift = x[:, :1].copy() if shift is None else shift  # sums of squares far from 0 have lost their digits
        count, first, second = count + x.shape[1], first + (x - shift).sum(1), second + np.square(x - shift).sum(1)
    assert shift is not None
    variance = np.maximum(second / count - np.square(first / count), 0)
    return Spread(low, high, tuple((first / count + shift[:, 0]).tolist()), tuple(np.sqrt(variance).tolist()))


def flat(found: Spread, level: float = LEVEL) -> str:
    """What is wrong where a channel is the same number everywhere, or nearly so; "" where none is."""
    least = min(found.std)
    if least >= level and least * RATIO >= max(found.std):
        return ""
    nearly = "nearly " if least > 0 else ""
    return f"channel {found.std.index(least)} is {nearly}the same number everywhere"


def seen(found: Spread) -> tuple[str, tuple[float, float] | None]:
    """What is wrong with numbers as a network is to see them, and the range which, brought to [-1, 1], would mend that."""
    channels, std = len(found.mean), found.all
    top = next((t for t in (255.0, 4095.0, 65535.0) if found.high <= t), math.ceil(found.high))
    if (found.low >= 0 and found.high > 16) or (std > SEEN[1] and found.low > -0.1 * found.high and found.high > 100):
        return f"they look like pixels of 0 to {top:g}, where -1 to 1 is meant", (0.0, top)
    if abs(found.low) <= 0.1 and 0.5 <= found.high <= 1.2:
        return "they look like 0 to 1, where -1 to 1 is meant", (0.0, 1.0)
    if std > SEEN[1] and -128 <= found.low < -100 and 100 < found.high <= 128:
        return "they look like pixels about 0, where -1 to 1 is meant", (-127.5, 127.5)
    if std > SEEN[1]:
        text = f"their std is {std:.3g}, where 0.5 to 1 is meant"
        if std > RAW[1]:
            return text, (-2 * std, 2 * std)
        return f"{text}: latents without their factor", (-1 / 0.18215, 1 / 0.18215)
    if std < SEEN[0] and channels not in IMAGES:
        text = f"their std is {std:.3g}, where 0.5 to 1 is meant: latents with their factor applied twice"
        return text, (-0.18215, 0.18215)
    return "", None


def raw(found: Spread) -> str:
    """What is wrong with latents that are to be as an autoencoder gives them; "" where nothing is."""
    if found.low >= 0 and found.high <= 1:
        return "they look like pixels of 0 to 1, not latents"
    if found.low > -0.1 * found.high and 100 < found.high <= 256:
        return "they look like pixels of 0 to 255 kept as floats, not latents"
    if found.all > RAW[1]:
        return f"their std is {found.all:.3g}, where an autoencoder gives 0.65 to 7.7: divided by a factor that they do not have"
    if found.all < RAW[0]:
        return f"their std is {found.all:.3g}, where an autoencoder gives 0.65 to 7.7: a factor is left in them"
    return ""


def last_axis(shape: tuple[int, ...]) -> bool:
    """Whether a row's shape (.., .., ..) is rather (H, W, C) than (C, H, W)."""
    return shape[2] in (1, 3, 4) and shape[0] > 4 and shape[1] > 4
