"""Judging as it was before it was made for 50,000 samples of 2,048 features: the slow twins, for the bench and for tests.

Moments take a product for every batch, whatever its size, once for all samples and once for their group. The square root of
the reference's covariance is taken by whoever needs it. Precision and recall compute every distance twice or more, a whole
row at a time, and find the third smallest by `kthvalue`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.evaluation.distances import Moments


class Stream:
    """Moments of features batch by batch, each merged as it comes: `distances.Stream` without its blocks."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: (B, F), any B."""
        f = features.double()
        mean = f.mean(0)
        scatter = (f - mean).T @ (f - mean)
        if not self.n:
            self.mean, self.scatter = mean, scatter
        else:
            off, total = mean - self.mean, self.n + len(f)
            self.scatter += scatter + torch.outer(off, off) * (self.n * len(f) / total)
            self.mean = self.mean + off * (len(f) / total)
        self.n += len(f)

    def moments(self) -> Moments:
        """Of two rows or more."""
        return Moments(self.mean, self.scatter / (self.n - 1))


def frechet(a: Moments, b: Moments) -> float:
    """`distances.frechet`, the square root of a's covariance anew for every call."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return max(float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross), 0.0)


def radii(x: Tensor, k: int = 3, block: int = 4096) -> Tensor:
    """Squared distance of every point to its k-th neighbour in the set, itself not counted. x: (N, F), N > k -> (N,)."""
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


def precision_recall(real: Tensor, made: Tensor, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """`neighbours.precision_recall`: (N, F), (M, F)."""
    centre = real.mean(0)
    real, made = real - centre, made - centre
    return inside(made, real, radii(real, k, block), block), inside(real, made, radii(made, k, block), block)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
