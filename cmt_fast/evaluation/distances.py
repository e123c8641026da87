"""Moments of features, whole or as a stream over ranks, and the distances between two sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.runtime import distributed

BLOCK, MOST = 512, 4096  # rows that are folded at once: at least, but for the last, and at most


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
    stream = Stream()
    stream.add(features, weights)
    return stream.moments()


class Stream:
    """Moments of features that arrive in batches; holds the mean (F,), the scatter (F, F) about it and a few rows.

    Rows wait until there are BLOCK of them, and are then merged about the common mean (Chan, Golub & LeVeque 1983): sums of
    squares, from which the mean's are taken off at the end, lose the digits in which features of a large mean differ. What
    the two means differ by is one more row of the block's product, so a merge is a single product into the scatter, and no
    other (F, F) is made. Rows may count by weights; those that do not weigh 1 each.
    """

    def __init__(self) -> None:
        self.weight = self.squares = 0.0  # sums of weights and of their squares, of the rows that are folded
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)
        self._folded = 0
        self._waiting: list[tuple[Tensor, Tensor | None]] = []

    @property
    def n(self) -> int:
        """Rows that came."""
        return self._folded + sum(len(f) for f, _ in self._waiting)

    def add(self, features: Tensor, weights: Tensor | None = None) -> None:
        """features: (B, F), any B, which stay as they are until they are folded; weights: (B,), positive."""
        if len(features):
            self._waiting.append((features, weights))
        if self.n - self._folded >= BLOCK:
            self.fold()

    def fold(self) -> None:
        """Merge the rows that wait. Moments of what is cut into other blocks differ in rounding alone."""
        waiting, self._waiting = self._waiting, []
        if len({w is None for _, w in waiting}) == 1:  # rows of both kinds are folded as they came
            given = [w for _, w in waiting if w is not None]
            waiting = [(torch.cat([f for f, _ in waiting]), torch.cat(given) if given else None)]
        for features, weights in waiting:
            for i in range(0, len(features), MOST):
                self._merge(features[i : i + MOST], None if weights is None else weights[i : i + MOST])

    def _merge(self, features: Tensor, weights: Tensor | None) -> None:
        f = features.double()
        if weights is None:
            weight = squares = float(len(f))
            mean = f.mean(0)
            rows = f - mean
        else:
            w = weights.double().to(f.device)
            weight, squares = float(w.sum()), float(w.square().sum())
            mean = (w[:, None] * f).sum(0) / weight
            rows = w.sqrt()[:, None] * (f - mean)
        first, total = not self._folded, self.weight + weight
        if first:
            self.mean, self.scatter = mean, rows.T @ rows
        else:
            off = mean - self.mean
            rows = torch.cat((rows, off[None] * (self.weight * weight / total) ** 0.5))
            self.scatter.addmm_(rows.T, rows)
            self.mean = self.mean + off * (weight / total)
        self._folded, self.weight, self.squares = self._folded + len(f), total, self.squares + squares

    def copy(self) -> Stream:
        """Another that goes on from here; this one stays as it is."""
        other = Stream()
        other._folded, other.weight, other.squares = self._folded, self.weight, self.squares
        other.mean, other.scatter, other._waiting = self.mean, self.scatter.clone(), list(self._waiting)
        return other

    def folded(self) -> Stream:
        """This one or, where rows wait, another with all of them folded, to be read alone; this one stays as it is."""
        if not self._waiting:
            return self
        other = self.copy()
        other.fold()
        return other

    def over_ranks(self) -> tuple[int, Moments]:
        """Samples and moments of all ranks together, the same on each; every rank must call it. Raises below 2 samples."""
        whole = self.shared()
        if whole.n < 2:
            raise ValueError(f"moments of {whole.n} samples: at least 2 are needed")
        return whole.n, whole.moments()

    def shared(self) -> Stream:
        """That of all ranks together, the same on each, to be read alone; every rank must call it."""
        own = self.folded()
        if distributed.size() == 1:
            return own
        width, whole = distributed.largest(len(own.mean)), Stream()
        whole._folded = int(distributed.sum_(torch.tensor(own.n)))
        if not whole._folded:
            return whole
        mean = own.mean if own.n else torch.zeros(width, dtype=torch.float64)
        scatter = own.scatter if own.n else torch.zeros(width, width, dtype=torch.float64)
        whole.weight, whole.squares = (
            float(distributed.sum_(torch.tensor(v, dtype=torch.float64))) for v in (own.weight, own.squares)
        )
        whole.mean = distributed.sum_(mean * own.weight) / whole.weight
        off = mean - whole.mean
        whole.scatter = distributed.sum_(torch.addr(scatter, off, off, alpha=own.weight))
        return whole

    def moments(self) -> Moments:
        """Of two rows or more: the scatter over n - 1 where every row weighs 1."""
        own = self.folded()
        return Moments(own.mean, own.scatter / (own.weight - own.squares / own.weight))

    @staticmethod
    def joined(streams: Sequence[Stream]) -> Stream:
        """One of the rows of all of them; they stay as they are. At least one, none empty."""
        whole = streams[0].copy()
        whole.fold()
        for other in (s.folded() for s in streams[1:]):
            off, total = other.mean - whole.mean, whole.weight + other.weight
            whole.scatter.add_(other.scatter).addr_(off, off, alpha=whole.weight * other.weight / total)
            whole.mean = whole.mean + off * (other.weight / total)
            whole.weight, whole.squares = total, whole.squares + other.squares
            whole._folded += other._folded
        return whole

    def without(self, part: Stream) -> Stream:
        """One of the rows that are in this and not in `part`, whose rows are in this: `joined` the other way round."""
        rest, own, part = Stream(), self.folded(), part.folded()
        rest.weight, rest.squares = own.weight - part.weight, own.squares - part.squares
        rest._folded = own._folded - part._folded
        rest.mean = own.mean + (own.mean - part.mean) * (part.weight / rest.weight)
        off = part.mean - rest.mean
        rest.scatter = (own.scatter - part.scatter).addr_(off, off, alpha=-rest.weight * part.weight / own.weight)
        return rest


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), float64, by symmetric eigenvalues.

    tr (C_a C_b)^1/2 is the sum of square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric; covariances
    of less than full rank are served as well. Raises FloatingPointError for moments that are not finite.
    """
    return Against(a)(b)


class Against:
    """Fréchet distances to one set of moments, whose square root is taken once, or was: a distance then costs the symmetric
    eigenvalues of one matrix.
    """

    def __init__(self, known: Moments, root: Tensor | None = None) -> None:
        """root: what `square_root` gave for the same covariance. Raises FloatingPointError as `frechet`."""
        self.known = finite("first", known)
        self.root = square_root(self.known.covariance) if root is None else root

    def __call__(self, b: Moments) -> float:
        """As `frechet`."""
        a, b = self.known, finite("second", b)
        cross = torch.linalg.eigvalsh(self.root @ b.covariance @ self.root).clamp(min=0).sqrt().sum()
        distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
        return max(float(distance), 0.0)

    def each(self, sets: Sequence[Callable[[], Moments]]) -> list[float]:
        """The distances to several sets, shared out over the ranks, the same on each; every rank must call it, with the same.

        sets: what makes the moments of each, called where they are compared. Raises as `frechet` on all ranks if on one.
        """
        out = torch.zeros(len(sets), dtype=torch.float64)

        def own() -> None:
            for i in range(distributed.rank(), len(sets), distributed.size()):
                out[i] = self(sets[i]())

        distributed.agreed(own, FloatingPointError, "a distance between moments that are not finite")
        return distributed.sum_(out).tolist()


def square_root(covariance: Tensor) -> Tensor:
    """C^1/2 of a symmetric (F, F) on the CPU; eigenvalues below zero are rounding, and count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def finite(which: str, m: Moments) -> Moments:
    """These moments, on the CPU. Raises FloatingPointError for those that are not finite; which: of two."""
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
