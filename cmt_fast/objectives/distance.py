"""Distances between images: those of `cmt_kernels.consistency_loss`, or between features of a frozen network."""

from __future__ import annotations

from cmt_kernels import consistency_loss
from torch import Tensor

from cmt_fast.objectives.batch import Kept, LossContext

PERCEPTUAL = ("lpips", "latent_lpips")  # those whose network is the stage's `perceptual.weights`


def distance(
    x: Tensor,
    target: Tensor,
    name: str,
    c: float,
    context: LossContext,
    sample: Tensor | None,
    kept: Kept | None = None,
) -> Tensor:
    """x, target: (B, ...), sample: (B,) global row ids or None -> (B,), gradient to x only.

    kept: features of the target, read where they are this distance's.
    Raises ValueError for a distance of features without its network.
    """
    known = kept.features if kept and kept.distance == name else None
    if name in PERCEPTUAL:
        if context.perceptual is None:
            raise ValueError(f"distance: {name!r} needs a network, perceptual.weights names it")
        return context.perceptual(x, target.detach(), context.random, sample, known)
    if name != "features":
        return consistency_loss(x, target, name, c)
    if context.features is None:
        raise ValueError("distance: 'features' needs a feature network, and this data has none")
    wanted = known[0] if known else context.features(target.detach())
    return consistency_loss(context.features(x), wanted, "squared_l2", c)
