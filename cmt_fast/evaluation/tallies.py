"""Samples as they come: what is taken of each batch, and what that adds up to.

The two are apart so that they can be in two processes: what is taken of a batch (`Seen`) is small beside what made it, a few
network calls and a feature network, and may be kept on disk; adding it up again gives the same bits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cmt_fast.evaluation import distances, neighbours, sharpness
from cmt_fast.evaluation.distances import Stream
from cmt_fast.evaluation.judges import Judge
from cmt_fast.evaluation.ledgers import Ledger
from cmt_fast.evaluation.measures import Measures, Seen
from cmt_fast.runtime import distributed


class Tally:
    """Samples as they come: moments of their features, right classes, and projections or features where those are used.

    n: how many will come, where every measure is asked for and others than `judge.expected` do.
    Raises ConfigError at once when there is no reference to compare with.
    """

    def __init__(self, judge: Judge, n: int = 0) -> None:
        n = n or judge.expected
        self.judge, self.stream, self.reference = judge, Stream(), judge.reference
        self.right = torch.zeros(2, dtype=torch.int64)
        self.kept: list[Tensor] = []
        self.slices: list[Tensor] = []
        self.seen, self.more = 0, None
        if judge.expected and judge.kept is not None:
            self.more = Measures(judge.kept, self.reference, n, judge.roots, judge.device)

    def copy(self) -> Tally:
        """Another that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.stream, other.kept, other.slices = self.stream.copy(), list(self.kept), list(self.slices)
        other.right, other.more = self.right.clone(), self.more and self.more.copy()
        return other

    def add(self, samples: Tensor, labels: Tensor | None, index: Tensor | None = None) -> None:
        """samples: (B, ...) in data units; labels: (B,) or None; index: (B,) of them among all, default: as they come."""
        self.take(self.look(samples, labels, index))

    def look(self, samples: Tensor, labels: Tensor | None, index: Tensor | None = None) -> Seen:
        """What is taken of samples, as `add` gets them; nothing is added up."""
        judge = self.judge
        if index is None:
            index = torch.arange(self.seen, self.seen + len(samples))
        seen = judge.look(samples)
        features, predicted = judge.space.features(seen), judge.space.classes(seen)
        right = torch.zeros(2, dtype=torch.int64)
        if predicted is not None and labels is not None:
            right[0] = int((predicted == labels.to(predicted.device)).sum())
            right[1] = len(labels)
        found = Seen(index.cpu(), features, right)
        if judge.file is None:
            found = found._replace(slices=distances.project(samples.cpu(), judge.directions))
        if self.more:
            energies = sharpness.each(samples) if sharpness.served(samples.shape[1:]) else None
            found = found._replace(features_2=self.more.second.features(samples), energies=energies)
        return found

    def take(self, seen: Seen) -> None:
        """Add up what was taken of a batch; it may come from a file, and its features from another device."""
        features = seen.features.to(getattr(self.judge.space, "device", seen.features.device))
        if self.judge.rows:
            self.kept.append(features.float().cpu())
        if seen.slices is not None:
            self.slices.append(seen.slices)
        if self.more:
            self.more.add(seen, features)  # its groups have all rows, so no other sum of all is made
        else:
            self.stream.add(features)
        self.seen += len(features)
        self.right += seen.right

    def figures(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """frechet; accuracy of labelled samples; precision and recall, or sliced_wasserstein; where more is asked for, what
        `measures` says. Every rank must call it. ledger: what is known already is not computed again.
        """
        judge, ledger = self.judge, ledger or Ledger()
        out = self.more.figures(ledger) if self.more else {"frechet": ledger.once("frechet", self._frechet)}
        if judge.file is None:
            out["sliced_wasserstein"] = ledger.once("sliced_wasserstein", self._sliced)
        right, labelled = distributed.sum_(self.right.clone()).tolist()
        if labelled:
            out["accuracy"] = right / labelled
        if judge.rows:
            out["precision"], out["recall"] = ledger.once("precision, all rows", self._neighbours)
        return out

    def _frechet(self) -> float:
        found = self.stream.over_ranks()[1]
        return self.judge.roots(self.reference.moments).each([lambda: found])[0]

    def _sliced(self) -> float:
        made = distributed.gather_uneven(torch.cat(self.slices) if self.slices else None)
        return distances.wasserstein(made, self.judge.projected, self.judge.weights)

    def _neighbours(self) -> tuple[float, float]:
        made = distributed.gather_uneven(torch.cat(self.kept) if self.kept else None)
        assert self.reference.features is not None
        return neighbours.shown(self.reference.features.cpu(), made, self.judge.device)


def figures(judge: Judge, samples: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Of samples (n, ...) with the labels (n,) that they were asked for, all on this rank."""
    tally = Tally(judge)
    tally.add(samples, labels)
    return tally.figures()
