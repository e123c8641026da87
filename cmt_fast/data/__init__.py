"""Data sets: what a kind of data is, and the rows of a step.

A Dataset is a few tensors and facts; which rows a step takes is `perm(seed, epoch)[position]`, a function of
the step alone, so a restart reads the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_fast.rng import DATA, Random
from cmt_fast.schema import Data


class Dataset(NamedTuple):
    """x: (N, ...) float32 in data units; labels: (N,) int64 or None; classes: 0 without labels."""

    x: Tensor
    labels: Tensor | None
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.x.shape[1:])


def load(config: Data) -> Dataset:
    """The data set a recipe names. Raises ValueError naming the key when it cannot be had."""
    from cmt_fast.data import digits, gmm, npz

    loaders: dict[str, Callable] = {"digits": digits.load, "gmm": gmm.load, "npz": npz.load}
    return loaders[config.kind](config)


class Loader:
    """Rows of a data set by position: each epoch a new permutation, global over ranks."""

    def __init__(self, data: Dataset, seed: int, device: torch.device) -> None:
        self.n, self.seed = len(data.x), seed
        self.x = data.x.to(device)
        self.labels = None if data.labels is None else data.labels.to(device)
        self._epochs: dict[int, Tensor] = {}

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """position: (B,) int64, counted from the start of training -> x (B, ...), labels (B,) or None."""
        epoch, place = position // self.n, position % self.n
        wanted = epoch.unique().tolist()
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in wanted}
        index = torch.empty_like(position)
        for e in wanted:
            index[epoch == e] = self._epochs[e][place[epoch == e]]
        return self.x[index], None if self.labels is None else self.labels[index]

    def _permutation(self, epoch: int) -> Tensor:
        return Random(self.seed, 0, epoch).permutation(DATA, self.n, self.x.device)
