"""What rows are: images or vectors with labels, in memory or in a store."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Rows(Protocol):
    """A data set. n: rows; shape: of one row; classes: 0 without labels; labels: (n,) int64 on the CPU or None.

    A label is a row of the network's table, whose length is `classes`; data/classes.py says which of them have rows.

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


def opened(data: Rows) -> Rows:
    """The rows themselves of data that are opened where they are first asked for. Raises ValueError where they cannot be had."""
    late = getattr(data, "opened", None)
    return late() if late else data


class Stored(Rows, Protocol):
    """A data set on disk: `rows` in two halves, so that bytes are read ahead and arithmetic is done on the device.

    read: index (B,) on the CPU -> rows as they are stored, on the CPU; raises ValueError naming what is damaged.
    finish: those on any device -> x (B, *shape) float32 there.
    """

    def read(self, index: Tensor) -> Tensor: ...

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor: ...


class Dataset(NamedTuple):
    """In memory. x: (N, ...) float32 in data units; labels: (N,) int64 or None; classes: 0 without labels.

    checksum: of the file they came from, empty where the recipe alone says what they are. class_names, class_ids: of all
    classes, where they have names or numbers of their source that differ from those here.
    """

    x: Tensor
    labels: Tensor | None
    classes: int
    checksum: str = ""
    class_names: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()

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
