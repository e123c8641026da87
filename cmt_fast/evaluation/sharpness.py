"""Sharpness: the share of an image's energy in high frequencies. Blur lowers it, noise raises it; real data say what is right.

The mean of each channel is taken off, and |FFT|^2 is summed over frequencies of a radius above half of Nyquist's,
sqrt(f_y^2 + f_x^2) > 1/4 cycles a pixel, over the sum of all. Energies are added up over all images first: one flat image
counts for little, as it should.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABOVE = 0.25  # cycles a pixel; Nyquist's frequency is 1/2


def served(shape: tuple[int, ...]) -> bool:
    """Whether rows of a shape have frequencies to speak of: images of 4 x 4 pixels and more."""
    return len(shape) == 3 and min(shape[1:]) >= 4


def each(x: Tensor) -> Tensor:
    """x: (N, C, H, W) -> of every image the energy of high frequencies, and of all, (N, 2). float64 on the CPU."""
    x = x.double()
    energy = torch.fft.fft2(x - x.mean((-2, -1), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64, device=x.device) for n in x.shape[-2:])
    high = (rows[:, None].square() + columns.square()).sqrt() > ABOVE
    return torch.stack((energy[..., high].flatten(1).sum(1), energy.flatten(1).sum(1)), 1).cpu()


def energies(x: Tensor) -> Tensor:
    """x: (N, C, H, W) -> sums over all images (2,) of what `each` says."""
    return each(x).sum(0)


def share(energies: Tensor) -> float | None:
    """What `energies` of any number of batches add up to; None of flat images."""
    high, whole = energies.tolist()
    return high / whole if whole > 0 else None
