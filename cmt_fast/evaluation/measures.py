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
from typing import Any

import torch
from torch import Tensor

from cmt_fast.evaluation import distances, neighbours, sharpness
from cmt_fast.evaluation.distances import Stream
from cmt_fast.evaluation.intervals import GROUPS
from cmt_fast.evaluation.kept import ROWS, Kept
from cmt_fast.evaluation.references import Reference
from cmt_fast.runtime import distributed

WIDE = 1024  # features, beyond which half as many groups are made: each holds a covariance


class Measures:
    """Of samples as they come. n: how many will come, which says how they are grouped: in blocks, as labels go round."""

    def __init__(self, kept: Kept, reference: Reference, n: int) -> None:
        self.kept, self.reference, self.n, self.second = kept, reference, n, kept.second
        groups = min(GROUPS // (1 + (len(reference.moments.mean) > WIDE)), n // 2)
        self.streams = [[Stream() for _ in range(max(1, groups))] for _ in range(2)]  # by space, by group
        self.energies = torch.zeros(max(1, groups), 2, dtype=torch.float64)
        self.features: tuple[list[Tensor], list[Tensor]] = ([], [])

    def copy(self) -> Measures:
        """Another that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.streams = [[stream.copy() for stream in space] for space in self.streams]
        other.energies, other.features = self.energies.clone(), (list(self.features[0]), list(self.features[1]))
        return other

    def add(self, samples: Tensor, features: Tensor, index: Tensor) -> None:
        """samples: (B, ...) in data units; features: (B, F) of the first space; index: (B,) of the samples among all."""
        both = (features, self.second.features(samples))
        index = index.cpu()
        group = (index * len(self.streams[0]) // self.n).clamp(max=len(self.streams[0]) - 1)
        for space, of, kept in zip(self.streams, both, self.features):
            for g in group.unique().tolist():
                space[g].add(of[(group == g).to(of.device)])
            kept.append(of[(index < ROWS).to(of.device)].float().cpu())
        if sharpness.served(samples.shape[1:]):
            for g in group.unique().tolist():
                self.energies[g] += sharpness.energies(samples[(group == g).to(samples.device)])

    def figures(self) -> dict[str, Any]:
        """As the module says, without those of `Tally`; every rank must call it."""
        out: dict[str, Any] = {"left_out": {}}
        references = (self.reference.moments, self.kept.moments_2)
        for key, streams, against in zip(("frechet", "frechet_2"), self.streams, references):
            groups, per = [s.shared() for s in streams], 1 if key == "frechet" else len(against.mean)
            distance = distances.Against(against)
            groups = [g for g in groups if g.n]
            whole = Stream.joined(groups)
            if key == "frechet_2":
                out[key] = distance(whole.moments()) / per
            if len(groups) > 1 and min(whole.n - g.n for g in groups) > 1:
                out["left_out"][key] = [distance(whole.without(g).moments()) / per for g in groups]
        energies = distributed.sum_(self.energies.clone())
        if "high_energy" in self.kept.tensors and (share := sharpness.share(energies.sum(0))) is not None:
            out["sharpness"] = share
            rest = [sharpness.share(energies.sum(0) - own) for own in energies if float(own[1])]
            out["left_out"]["sharpness"] = [v for v in rest if v is not None]
        for tail, real, made in zip(("", "_2"), self._real(), self.features):
            near = distributed.gather_uneven(torch.cat(made) if made else None)
            if real is not None and min(len(real), len(near)) > neighbours.K:
                out[f"precision{tail}"], out[f"recall{tail}"] = neighbours.precision_recall(real, near)
        return out

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
