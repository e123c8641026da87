"""Data sets: what a kind of data is, and the rows of a step.

Small data are a few tensors (Dataset); large data stay on disk (data/latents.py). Both answer `rows`. Which rows a
step takes is `perm(seed, epoch)[position]`, a function of the step alone, so a restart reads the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cmt_fast.config.schema import Data


class Rows(Protocol):
    """A data set. n: rows; shape: of one row; classes: 0 without labels; labels: (n,) int64 on the CPU or None.

    rows: index (B,) int64 -> x (B, *shape) float32 in data units, labels (B,) or None. Rows that are distributions
    (latents with a standard deviation) are drawn from: draw (B,) int64 says which draw of each row, None takes means.
    facts: what tells these rows, in this order, from others; a run keeps it.
    """

    n: int
    shape: tuple[int, ...]
    classes: int
    labels: Tensor | None

    @property
    def facts(self) -> dict[str, int | str]: ...

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]: ...


class Stored(Rows, Protocol):
    """A data set on disk: `rows` in two halves, so that bytes are read ahead and arithmetic is done on the device.

    read: index (B,) on the CPU -> rows as they are stored, on the CPU; raises ValueError naming what is damaged.
    finish: those on any device -> x (B, *shape) float32 there.
    """

    def read(self, index: Tensor) -> Tensor: ...

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor: ...


class Dataset(NamedTuple):
    """In memory. x: (N, ...) float32 in data units; labels: (N,) int64 or None; classes: 0 without labels.

    checksum: of the file they came from, empty where the recipe alone says what they are.
    """

    x: Tensor
    labels: Tensor | None
    classes: int
    checksum: str = ""

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.x.shape[1:])

    @property
    def facts(self) -> dict[str, int | str]:
        """As Rows."""
        return {"rows": self.n} | ({"xxh3_128": self.checksum} if self.checksum else {})

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As Rows; rows are points, so `draw` and `seed` change nothing."""
        return self.x[index], None if self.labels is None else self.labels[index]


def load(config: Data) -> Rows:
    """The data set a recipe names. Raises ValueError naming the key when it cannot be had."""
    from cmt_fast.data import digits, gmm, npz, opening

    loaders: dict[str, Callable] = {"digits": digits.load, "gmm": gmm.load, "npz": npz.load, "latents": opening.load}
    return loaders[config.kind](config)


def in_memory(data: Rows, limit: int = 10_000) -> Dataset:
    """Small data as they are; of data on disk the first draw of at most `limit` rows, evenly spaced."""
    if isinstance(data, Dataset):
        return data
    index = torch.arange(min(data.n, limit)) * data.n // min(data.n, limit)
    parts = [data.rows(i, torch.zeros_like(i)) for i in index.split(256)]
    labels = None if data.labels is None else data.labels[index]
    return Dataset(torch.cat([x for x, _ in parts]), labels, data.classes)
