"""Distances between images: those of `cmt_kernels.consistency_loss`, or between features of a frozen network."""

from __future__ import annotations

from cmt_kernels import consistency_loss
from torch import Tensor

from cmt_fast.objectives.batch import World

PERCEPTUAL = ("lpips", "latent_lpips")  # those whose network is the stage's `perceptual.weights`


def distance(x: Tensor, target: Tensor, name: str, c: float, world: World, sample: Tensor | None) -> Tensor:
    """x, target: (B, ...), sample: (B,) global row ids or None -> (B,), gradient to x only.

    Raises ValueError for a distance of features without its network.
    """
    if name in PERCEPTUAL:
        if world.perceptual is None:
            raise ValueError(f"distance: {name!r} needs a network, perceptual.weights names it")
        return world.perceptual(x, target.detach(), world.random, sample)
    if name != "features":
        return consistency_loss(x, target, name, c)
    if world.features is None:
        raise ValueError("distance: 'features' needs a feature network, and this data has none")
    return consistency_loss(world.features(x), world.features(target.detach()), "squared_l2", c)
