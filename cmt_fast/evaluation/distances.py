"""Moments of features, whole or as a stream over ranks, and the distances between two sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.runtime import distributed


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """features: (N, F), N >= 2."""
    f = features.double()
    return Moments(f.mean(0), torch.cov(f.T).reshape(f.shape[1], f.shape[1]))


class Stream:
    """Moments of features that arrive in batches; holds the mean (F,) and the scatter (F, F) about it, never the features.

    Batches are merged about their common mean (Chan, Golub & LeVeque 1983): sums of squares, from which the mean's are
    taken off at the end, lose the digits in which features of a large mean differ.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: (B, F), any B."""
        f = features.double()
        if not len(f):
            return
        mean = f.mean(0)
        scatter = (f - mean).T @ (f - mean)
        if not self.n:
            self.n, self.mean, self.scatter = len(f), mean, scatter
            return
        total, off = self.n + len(f), mean - self.mean
        self.scatter += scatter + torch.outer(off, off) * (self.n * len(f) / total)
        self.mean = self.mean + off * (len(f) / total)
        self.n = total

    def copy(self) -> Stream:
        """Another that goes on from here; this one stays as it is."""
        other = Stream()
        other.n, other.mean, other.scatter = self.n, self.mean, self.scatter.clone()
        return other

    def over_ranks(self) -> tuple[int, Moments]:
        """Samples and moments of all ranks together, the same on each; every rank must call it. Raises below 2 samples."""
        width = distributed.largest(len(self.mean))
        n = int(distributed.sum_(torch.tensor(self.n)))
        if n < 2:
            raise ValueError(f"moments of {n} samples: at least 2 are needed")
        mean = self.mean if self.n else torch.zeros(width, dtype=torch.float64)
        scatter = self.scatter if self.n else torch.zeros(width, width, dtype=torch.float64)
        common = distributed.sum_(mean * self.n) / n
        off = mean - common
        return n, Moments(common, distributed.sum_(scatter + torch.outer(off, off) * self.n) / (n - 1))


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), float64, by symmetric eigenvalues.

    tr (C_a C_b)^1/2 is the sum of square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def directions(dim: int, n: int = 128, seed: int = 0) -> Tensor:
    """Random unit vectors as columns. (dim, n) float64."""
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(dim, n, generator=g, dtype=torch.float64), dim=0)


def project(x: Tensor, onto: Tensor) -> Tensor:
    """x: (N, ...) onto the columns of (dim, n) -> (N, n) float64."""
    return x.flatten(1).double() @ onto


def wasserstein(pa: Tensor, pb: Tensor) -> float:
    """2-Wasserstein distance of projections (N, n) and (M, n), averaged over the n, at the quantiles of the smaller set."""
    n = min(len(pa), len(pb))
    q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    pa, pb = (torch.quantile(p, q, dim=0) for p in (pa, pb))
    return float((pa - pb).square().mean().sqrt())


def sliced_wasserstein(a: Tensor, b: Tensor, n: int = 128, seed: int = 0) -> float:
    """2-Wasserstein distance averaged over n random directions (Bonneel et al. 2015). a: (N, ...), b: (M, ...)."""
    onto = directions(a[0].numel(), n, seed)
    return wasserstein(project(a, onto), project(b, onto))
