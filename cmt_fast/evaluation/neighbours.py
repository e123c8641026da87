"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019): how much of one set lies in the other's manifold.

A set's manifold is the union of balls around its points, each as wide as the way to its k-th neighbour in the set.
Distances are taken block by block; the N x M table is never whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 3  # neighbours, as Kynkäänniemi et al. count


def radii(x: Tensor, k: int = K, block: int = 4096) -> Tensor:
    """Squared distance of every point to its k-th neighbour in the set, itself not counted. x: (N, F), N > k -> (N,)."""
    if len(x) <= k:
        raise ValueError(
            f"precision and recall look at the {k}-th neighbour, and a set has {len(x)} rows; {k + 1} are needed"
        )
    parts = []
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        d = _squared(rows, x)
        own = torch.arange(len(rows), device=x.device)
        d[own, own + start] = float("inf")
        parts.append(d.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def inside(points: Tensor, centres: Tensor, radius: Tensor, block: int = 4096) -> float:
    """The share of points (N, F) that lie in a ball about one of centres (M, F) with squared radius (M,)."""
    count = sum(int((_squared(p, centres) <= radius).any(1).sum()) for p in points.split(block))
    return count / len(points)


def precision_recall(real: Tensor, made: Tensor, k: int = K, block: int = 4096) -> tuple[float, float]:
    """Precision: samples in the manifold of real features; recall: real ones in that of the samples. (N, F), (M, F)."""
    centre = real.mean(0)  # near the origin squared distances by dot products keep their digits
    real, made = real - centre, made - centre
    return inside(made, real, radii(real, k, block), block), inside(real, made, radii(made, k, block), block)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M) of rows of a (N, F) and b (M, F)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
