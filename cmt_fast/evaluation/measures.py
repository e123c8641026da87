"""What is said of samples beside one distance: a second space, sharpness, precision and recall, and how sure all of it is.

For reports and `cmt eval`; evaluations in training go without. Figures of one set of samples, as `Tally.figures` gives them:

    frechet, sliced_wasserstein, accuracy    as always
    frechet_2                                Fréchet distance in the second space, a mean over its features (second.py)
    sharpness                                share of energy in high frequencies, of images (sharpness.py)
    precision, recall                        Kynkäänniemi et al. 2019 in the first space, of at most 10,000 samples and rows
    precision_2, recall_2                    the same in the second
    left_out                                 {"frechet": [...], "frechet_2": [...], "sharpness": [...]}: these without each
                                             group of samples in turn, of which intervals are made (intervals.py)
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.evaluation import distances, neighbours, sharpness
from cmt_fast.evaluation.distances import Moments, Stream
from cmt_fast.evaluation.intervals import GROUPS
from cmt_fast.evaluation.kept import ROWS, Kept
from cmt_fast.evaluation.ledgers import Ledger
from cmt_fast.evaluation.references import Reference
from cmt_fast.evaluation.roots import Roots
from cmt_fast.runtime import distributed

WIDE = 1024  # features, beyond which half as many groups are made: each holds a covariance


class Seen(NamedTuple):
    """Of B samples: index (B,) among all; features (B, F); right (2,): those of the class that was asked for, and those of
    which one was. Where they are used: projections (B, n); features_2 (B, F2) of the second space; energies (B, 2).
    """

    index: Tensor
    features: Tensor
    right: Tensor
    slices: Tensor | None = None
    features_2: Tensor | None = None
    energies: Tensor | None = None


class Measures:
    """Of samples as they come. n: how many will come, which says how they are grouped: in blocks, as labels go round."""

    def __init__(self, kept: Kept, reference: Reference, n: int, roots: Roots, device: torch.device) -> None:
        self.kept, self.reference, self.n, self.second = kept, reference, n, kept.second
        self.roots, self.device = roots, device
        self.groups = max(1, min(GROUPS // (1 + (len(reference.moments.mean) > WIDE)), n // 2))
        self.streams = [[Stream() for _ in range(self.groups)] for _ in range(2)]  # by space, by group
        self.energies = torch.zeros(self.groups, 2, dtype=torch.float64)
        self.features: tuple[list[Tensor], list[Tensor]] = ([], [])

    def copy(self) -> Measures:
        """Another that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.streams = [[stream.copy() for stream in space] for space in self.streams]
        other.energies, other.features = self.energies.clone(), (list(self.features[0]), list(self.features[1]))
        return other

    def add(self, seen: Seen, features: Tensor) -> None:
        """seen: of a batch; features: its own (B, F) of the first space, where their moments are to be taken."""
        assert seen.features_2 is not None
        group = (seen.index * self.groups // self.n).clamp(max=self.groups - 1)
        for space, of, kept in zip(self.streams, (features, seen.features_2), self.features):
            for g in group.unique().tolist():
                space[g].add(of[(group == g).to(of.device)])
            for earlier in space[: int(group.min())]:
                earlier.fold()  # samples come in order: of these no more will, and none waits
            kept.append(of[(seen.index < ROWS).to(of.device)].float().cpu())
        if seen.energies is not None:
            self.energies.index_add_(0, group, seen.energies)

    def figures(self, ledger: Ledger) -> dict[str, Any]:
        """As the module says, without those of `Tally` other than frechet; every rank must call it."""
        out: dict[str, Any] = {"left_out": {}}
        against = (self.reference.moments, self.kept.moments_2)
        for key, streams, known in zip(("frechet", "frechet_2"), self.streams, against):
            value, left_out = ledger.once(key, lambda streams=streams, known=known: self._distances(streams, known))
            per = 1 if key == "frechet" else len(known.mean)
            out[key] = value / per
            if left_out:
                out["left_out"][key] = [v / per for v in left_out]
        energies = distributed.sum_(self.energies.clone())
        if "high_energy" in self.kept.tensors and (share := sharpness.share(energies.sum(0))) is not None:
            out["sharpness"] = share
            rest = [sharpness.share(energies.sum(0) - own) for own in energies if float(own[1])]
            out["left_out"]["sharpness"] = [v for v in rest if v is not None]
        for tail, real, made in zip(("", "_2"), self._real(), self.features):
            found = ledger.once(f"precision{tail}", lambda real=real, made=made: self._neighbours(real, made))
            if found:
                out[f"precision{tail}"], out[f"recall{tail}"] = found
        return out

    def _distances(self, streams: list[Stream], known: Moments) -> tuple[float, list[float]]:
        """To the reference, of all samples and of those without each group in turn."""
        groups = [g for g in (s.shared() for s in streams) if g.n]
        if sum(g.n for g in groups) < 2:
            raise ValueError(f"moments of {sum(g.n for g in groups)} samples: at least 2 are needed")
        whole = Stream.joined(groups)
        enough = len(groups) > 1 and min(whole.n - g.n for g in groups) > 1
        rest = [lambda g=g: whole.without(g).moments() for g in groups] if enough else []
        first, *left_out = self.roots(known).each([whole.moments, *rest])
        return first, left_out

    def _neighbours(self, real: Tensor | None, made: list[Tensor]) -> tuple[float, float] | None:
        near = distributed.gather_uneven(torch.cat(made) if made else None)
        if real is None or min(len(real), len(near)) <= neighbours.K:
            return None
        return neighbours.shown(real, near, self.device)

    def _real(self) -> tuple[Tensor | None, Tensor | None]:
        return self.kept.tensors.get("features"), self.kept.tensors.get("features_2")


def apart(features: Tensor, n: int, rows: int | None) -> float | None:
    """The Fréchet distance of n samples of a perfect generator of new rows to `rows` real ones, from real features (M, F).

    Two halves of M/2 rows differ by c (2/M + 2/M): the distance of finite sets falls as 1/n. c then gives c (1/n + 1/rows).
    None where a half has no more rows than features, for which that law does not hold.
    """
    a, b = features[0::2], features[1::2]
    if min(len(a), len(b)) <= features.shape[1]:
        return None
    c = distances.frechet(distances.moments(a), distances.moments(b)) / (1 / len(a) + 1 / len(b))
    return c * (1 / n + (1 / rows if rows else 0.0))
