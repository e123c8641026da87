"""Distances between images: those of `cmt_kernels.consistency_loss`, or between features of a frozen network."""

from __future__ import annotations

from typing import Any

from cmt_kernels import consistency_loss
from torch import Tensor

from cmt_fast.objectives.batch import Kept, LossContext, StageContext

PERCEPTUAL = ("lpips", "latent_lpips")  # those whose network is the stage's `perceptual.weights`


def augmentation(name: str, context: LossContext, x: Tensor, sample: Tensor | None) -> Any:
    """What a distance between rows like x (B, ...) draws at this step, as tensors; None where it draws nothing.

    sample: (B,) global row ids or None.
    """
    if name not in PERCEPTUAL or context.perceptual is None:
        return None
    return context.perceptual.draw(context.random, sample, tuple(x.shape[1:]))


def distance(
    x: Tensor, target: Tensor, name: str, c: float, stage: StageContext, augmentation: Any, kept: Kept | None = None
) -> Tensor:
    """x, target: (B, ...) -> (B,), gradient to x only.

    augmentation: what `augmentation` drew; kept: features of the target, read where they are this distance's.
    Raises ValueError for a distance of features without its network.
    """
    known = kept.features if kept and kept.distance == name else None
    if name in PERCEPTUAL:
        if stage.perceptual is None:
            raise ValueError(f"distance: {name!r} needs a network, perceptual.weights names it")
        return stage.perceptual(x, target.detach(), augmentation, known)
    if name != "features":
        return consistency_loss(x, target, name, c)
    if stage.features is None:
        raise ValueError("distance: 'features' needs a feature network, and this data has none")
    wanted = known[0] if known else stage.features(target.detach())
    return consistency_loss(stage.features(x), wanted, "squared_l2", c)
