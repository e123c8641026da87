"""Distances between images: those of `cmt_kernels.consistency_loss`, or squared l2 in a frozen network's features."""

from __future__ import annotations

from collections.abc import Callable

from cmt_kernels import consistency_loss
from torch import Tensor


def distance(x: Tensor, target: Tensor, name: str, c: float, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    """x, target: (B, ...) -> (B,), gradient to x only. Raises ValueError for "features" without a feature network."""
    if name != "features":
        return consistency_loss(x, target, name, c)
    if features is None:
        raise ValueError("distance: 'features' needs a feature network, and this data has none")
    return consistency_loss(features(x), features(target.detach()), "squared_l2", c)
