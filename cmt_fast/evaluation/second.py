"""A second feature space, unrelated to the first: it needs no training, no weights and no download.

One distance can be won by samples that are worse to look at, as every feature space is blind to something. The first space
(features.py) is of what tells classes apart, or of the numbers themselves; this one is of local frequencies for images, as
texture and edges are, and of a characteristic function for vectors. Where both agree on a winner, more can be believed.

Images (N, C, H, W): the 16 products of 4-point cosines (DCT-II) over 4 x 4 windows, at full size and at every half of it down to
4 x 4; every window of a side up to 63, every second of one up to 95, and so on. Magnitudes are averaged over 2 x 2 fields of the
image, so that where an edge lies exactly does not matter but that it is there does (the first layer of a scattering transform,
Mallat 2012). The plain mean of a window, and the one window of the coarsest scale, keep their sign. Vectors: cosines and sines of
random projections at three widths, from a fixed seed (random Fourier features, Rahimi & Recht 2007).

Every feature is then measured in standard deviations of the real data's, and the Fréchet distance is a mean over features:
0.01 means that a typical feature is off by as much as 1 % of its variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 4  # pixels along a side
WIDEST = 640  # features; beyond it fields, then channels, are averaged
DENSE = 32  # windows along a side, from twice as many of which on some are passed over
SMALLEST = 1e-3  # of the largest deviation of a feature: one that hardly varies is not blown up
WIDTHS, EACH = (0.5, 1.0, 2.0), 32  # of the projections of a vector, per standard deviation


class Second:
    """Of rows of one shape. fitted: the real features' mean and deviation, and of vectors the numbers' own, see `fit`."""

    def __init__(self, shape: tuple[int, ...], fitted: dict[str, Tensor] | None = None) -> None:
        self.shape, self.fitted = shape, fitted or {}
        self.images = len(shape) == 3 and min(shape[1:]) >= WINDOW
        self.name = "local-frequencies-1" if self.images else "random-fourier-1"

    def fit(self, rows: Tensor) -> tuple[Second, Tensor]:
        """The space in which every feature of the real rows (N, ...) has mean 0 and deviation 1, and those features."""
        flat = rows.flatten(1).double()
        own = {"centre": flat.mean(0), "scale": _deviation(flat)} if not self.images else {}
        plain = torch.cat(list(Second(self.shape, own).plain(rows)))
        mean, deviation = plain.double().mean(0), _deviation(plain.double())
        found = Second(self.shape, {**own, "mean": mean, "deviation": deviation})
        return found, found._measured(plain)

    def features(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (N, F) float32 on the CPU. Raises KeyError before `fit`."""
        return self._measured(torch.cat(list(self.plain(rows))))

    def _measured(self, plain: Tensor) -> Tensor:
        return ((plain - self.fitted["mean"]) / self.fitted["deviation"]).float()

    def plain(self, rows: Tensor, batch: int = 256) -> Iterator[Tensor]:
        """Features as they are, batch by batch: they are a few dozen times as large as the rows."""
        call = self._frequencies if self.images else self._fourier
        with torch.no_grad():
            yield from (call(part.float()).cpu() for part in rows.split(batch))

    def _frequencies(self, x: Tensor) -> Tensor:
        n, channels, *_ = x.shape
        filters = _cosines().to(x)
        scales = int(math.log2(min(self.shape[1:]) / WINDOW)) + 1
        fields = 2 if channels * len(filters) * (4 * (scales - 1) + 1) <= WIDEST else 1
        parts = []
        for scale in range(scales):
            h, w = x.shape[2:]
            y = F.conv2d(x.reshape(n * channels, 1, h, w), filters, stride=max(1, min(h, w) // DENSE))
            if y.shape[2:] != (1, 1):
                y = torch.cat((y[:, :1], y[:, 1:].abs()), 1)
            y = F.adaptive_avg_pool2d(y, (min(fields, y.shape[2]), min(fields, y.shape[3])))
            parts.append(y.reshape(n, channels, -1))
            if scale + 1 < scales:
                x = F.avg_pool2d(x, 2)
        whole = torch.cat(parts, 2)
        return whole.flatten(1) if whole[0].numel() <= WIDEST else whole.mean(1)

    def _fourier(self, x: Tensor) -> Tensor:
        flat = (x.flatten(1).cpu().double() - self.fitted["centre"]) / self.fitted["scale"]
        g = torch.Generator().manual_seed(0)
        onto = torch.randn(flat.shape[1], len(WIDTHS) * EACH, generator=g, dtype=torch.float64) / flat.shape[1] ** 0.5
        angle = flat @ onto * torch.tensor(WIDTHS, dtype=torch.float64).repeat_interleave(EACH)
        return torch.cat((angle.cos(), angle.sin()), 1)


def _deviation(x: Tensor) -> Tensor:
    """Of columns (N, F), at least SMALLEST of the largest one's; 1 where nothing varies."""
    found = x.std(0, correction=0)
    largest = float(found.max())
    return found.clamp(min=SMALLEST * largest) if largest > 0 else torch.ones_like(found)


def _cosines() -> Tensor:
    """Products of orthonormal cosines, the constant one first. (16, 1, 4, 4)."""
    i = torch.arange(WINDOW, dtype=torch.float64)
    rows = torch.cos(math.pi / WINDOW * (i + 0.5) * i[:, None]) * (2 / WINDOW) ** 0.5
    rows[0] /= 2**0.5
    return torch.einsum("ah,bw->abhw", rows, rows).reshape(WINDOW**2, 1, WINDOW, WINDOW)
