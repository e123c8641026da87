"""Moments of features, whole or as a stream over ranks, and the distances between two sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.runtime import distributed


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """features: (N, F), N >= 2; weights: (N,) of sum 1, by which rows count: m = sum w x,
    C = sum w (x - m)(x - m)^T / (1 - sum w^2), which for w = 1/N is the covariance over N - 1. Raises ValueError for N < 2.
    """
    if len(features) < 2:
        raise ValueError(f"moments of {len(features)} rows: at least 2 are needed")
    if weights is not None:
        stream = Stream()
        stream.add(features, weights)
        return stream.over_ranks()[1]
    f = features.double()
    return Moments(f.mean(0), torch.cov(f.T).reshape(f.shape[1], f.shape[1]))


class Stream:
    """Moments of features that arrive in batches; holds the mean (F,) and the scatter (F, F) about it, never the features.

    Batches are merged about their common mean (Chan, Golub & LeVeque 1983): sums of squares, from which the mean's are
    taken off at the end, lose the digits in which features of a large mean differ. Rows may count by weights; those that do
    not weigh 1 each.
    """

    def __init__(self) -> None:
        self.n = 0
        self.weight = self.squares = 0.0  # sums of weights and of their squares
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor, weights: Tensor | None = None) -> None:
        """features: (B, F), any B; weights: (B,), positive."""
        f = features.double()
        if not len(f):
            return
        if weights is None:
            weight = squares = float(len(f))
            mean = f.mean(0)
            scatter = (f - mean).T @ (f - mean)
        else:
            w = weights.double().to(f.device)
            weight, squares = float(w.sum()), float(w.square().sum())
            mean = (w[:, None] * f).sum(0) / weight
            scatter = (f - mean).T @ (w[:, None] * (f - mean))
        first, total = not self.n, self.weight + weight
        if first:
            self.mean, self.scatter = mean, scatter
        else:
            off = mean - self.mean
            self.scatter += scatter + torch.outer(off, off) * (self.weight * weight / total)
            self.mean = self.mean + off * (weight / total)
        self.n, self.weight, self.squares = self.n + len(f), total, self.squares + squares

    def copy(self) -> Stream:
        """Another that goes on from here; this one stays as it is."""
        other = Stream()
        other.n, other.weight, other.squares = self.n, self.weight, self.squares
        other.mean, other.scatter = self.mean, self.scatter.clone()
        return other

    def over_ranks(self) -> tuple[int, Moments]:
        """Samples and moments of all ranks together, the same on each; every rank must call it. Raises below 2 samples."""
        whole = self.shared()
        if whole.n < 2:
            raise ValueError(f"moments of {whole.n} samples: at least 2 are needed")
        return whole.n, whole.moments()

    def shared(self) -> Stream:
        """That of all ranks together, the same on each; every rank must call it."""
        width, whole = distributed.largest(len(self.mean)), Stream()
        whole.n = int(distributed.sum_(torch.tensor(self.n)))
        if not whole.n:
            return whole
        mean = self.mean if self.n else torch.zeros(width, dtype=torch.float64)
        scatter = self.scatter if self.n else torch.zeros(width, width, dtype=torch.float64)
        whole.weight, whole.squares = (
            float(distributed.sum_(torch.tensor(v, dtype=torch.float64))) for v in (self.weight, self.squares)
        )
        whole.mean = distributed.sum_(mean * self.weight) / whole.weight
        off = mean - whole.mean
        whole.scatter = distributed.sum_(scatter + torch.outer(off, off) * self.weight)
        return whole

    def moments(self) -> Moments:
        """Of two rows or more: the scatter over n - 1 where every row weighs 1."""
        return Moments(self.mean, self.scatter / (self.weight - self.squares / self.weight))

    @staticmethod
    def joined(streams: Sequence[Stream]) -> Stream:
        """One of the rows of all of them; they stay as they are. At least one, none empty."""
        whole = streams[0].copy()
        for other in streams[1:]:
            off, total = other.mean - whole.mean, whole.weight + other.weight
            whole.scatter += other.scatter + torch.outer(off, off) * (whole.weight * other.weight / total)
            whole.mean = whole.mean + off * (other.weight / total)
            whole.n, whole.weight, whole.squares = whole.n + other.n, total, whole.squares + other.squares
        return whole

    def without(self, part: Stream) -> Stream:
        """One of the rows that are in this and not in `part`, whose rows are in this: `joined` the other way round."""
        rest = Stream()
        rest.n, rest.weight, rest.squares = self.n - part.n, self.weight - part.weight, self.squares - part.squares
        rest.mean = self.mean + (self.mean - part.mean) * (part.weight / rest.weight)
        off = part.mean - rest.mean
        rest.scatter = self.scatter - part.scatter - torch.outer(off, off) * (rest.weight * part.weight / self.weight)
        return rest


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), float64, by symmetric eigenvalues.

    tr (C_a C_b)^1/2 is the sum of square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric; covariances
    of less than full rank are served as well. Raises FloatingPointError for moments that are not finite.
    """
    return Against(a)(b)


class Against:
    """Fréchet distances to one set of moments, whose square root is taken once."""

    def __init__(self, known: Moments) -> None:
        self.known = self._finite("first", known)
        values, vectors = torch.linalg.eigh(known.covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, b: Moments) -> float:
        """As `frechet`."""
        a, b = self.known, self._finite("second", b)
        cross = torch.linalg.eigvalsh(self.root @ b.covariance @ self.root).clamp(min=0).sqrt().sum()
        distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
        return max(float(distance), 0.0)

    @staticmethod
    def _finite(which: str, m: Moments) -> Moments:
        if not (torch.isfinite(m.mean).all() and torch.isfinite(m.covariance).all()):
            raise FloatingPointError(f"a distance between moments of which the {which} are not finite")
        return Moments(m.mean.cpu(), m.covariance.cpu())


def directions(dim: int, n: int = 128, seed: int = 0) -> Tensor:
    """Random unit vectors as columns. (dim, n) float64."""
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(dim, n, generator=g, dtype=torch.float64), dim=0)


def project(x: Tensor, onto: Tensor) -> Tensor:
    """x: (N, ...) onto the columns of (dim, n) -> (N, n) float64."""
    return x.flatten(1).double() @ onto


def wasserstein(pa: Tensor, pb: Tensor, weights: Tensor | None = None) -> float:
    """2-Wasserstein distance of projections (N, n) and (M, n), averaged over the n, at the quantiles of the smaller set.

    weights: (M,) of sum 1, by which the rows of pb count.
    """
    n = min(len(pa), len(pb))
    q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    pa, pb = torch.quantile(pa, q, dim=0), quantiles(pb, weights, q)
    return float((pa - pb).square().mean().sqrt())


def quantiles(p: Tensor, weights: Tensor | None, q: Tensor) -> Tensor:
    """Of columns (M, n), whose rows may weigh (M,) of sum 1, at q (Q,) -> (Q, n)."""
    return torch.quantile(p, q, dim=0) if weights is None else _quantiles(p, weights, q)


def _quantiles(p: Tensor, weights: Tensor, q: Tensor) -> Tensor:
    """Quantiles of columns (M, n) whose rows weigh w: linear between x_(i) at c_i - w_(i)/2, c the sums of weights."""
    x, order = p.sort(dim=0)
    w = weights.double()[order]
    at = (w.cumsum(0) - w / 2).T.contiguous()
    hi = torch.searchsorted(at, q.expand(len(at), -1).contiguous()).clamp(1, len(p) - 1)
    a, b = at.gather(1, hi - 1), at.gather(1, hi)
    lo, up = x.T.gather(1, hi - 1), x.T.gather(1, hi)
    part = torch.where(b > a, (q - a) / (b - a), 0.0).clamp(0, 1)
    return (lo + part * (up - lo)).T


def sliced_wasserstein(a: Tensor, b: Tensor, n: int = 128, seed: int = 0) -> float:
    """2-Wasserstein distance averaged over n random directions (Bonneel et al. 2015). a: (N, ...), b: (M, ...)."""
    onto = directions(a[0].numel(), n, seed)
    return wasserstein(project(a, onto), project(b, onto))
