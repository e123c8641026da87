"""Data sets: what a kind of data is, and the rows of a step.

Small data are a few tensors (Dataset); large data stay on disk (data/latents.py). Both answer `rows`. Which rows a
step takes is `perm(seed, epoch)[position]`, a function of the step alone, so a restart reads the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cmt_fast.rng import DATA, Random
from cmt_fast.schema import Data, Feed


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


class Order:
    """Which row each position is: every epoch a permutation, global over ranks, a function of (seed, epoch) alone.

    It is uniform over all rows, unless the data set has `order(random) -> (n,)` of its own, as archives have.
    """

    def __init__(self, data: Rows, seed: int, device: torch.device | str = "cpu") -> None:
        self.data, self.seed, self.device = data, seed, device
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position: (B,) int64, counted from the start of training -> row of the data set, epoch; (B,) both."""
        epoch, place = position // self.data.n, position % self.data.n
        wanted = epoch.unique().tolist()
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in wanted}
        index = torch.empty_like(position)
        for e in wanted:
            index[epoch == e] = self._epochs[e][place[epoch == e]]
        return index, epoch

    def _permutation(self, epoch: int) -> Tensor:
        random, own = Random(self.seed, 0, epoch), getattr(self.data, "order", None)
        return own(random).to(self.device) if own else random.permutation(DATA, self.data.n, self.device)


class Loader:
    """Rows of a data set by position.

    Data in memory move to the device once. Data on disk are read by a background thread, which reads ahead for the
    next steps when it is told that positions advance by `stride` a step, and end in pinned memory where there is a GPU.
    """

    AHEAD = 3  # steps

    def __init__(self, data: Rows, seed: int, device: torch.device, stride: int = 0) -> None:
        self.seed, self.device, self.stride = seed, device, stride
        self.data, self.stored = data, not isinstance(data, Dataset)
        self.order = Order(data, seed, self.place)
        if isinstance(data, Dataset):
            self.data = Dataset(
                data.x.to(device), None if data.labels is None else data.labels.to(device), data.classes
            )
        else:
            # with a second team of OpenMP threads in the process each team's threads sleep between parallel loops in place
            # of spinning: small networks on a CPU then take twice as long
            self._thread = ThreadPoolExecutor(1, "rows", initializer=torch.set_num_threads, initargs=(1,))
            self._ahead: dict[tuple[int, int, int], Future] = {}

    @property
    def place(self) -> torch.device:
        """Where positions are wanted: a device in use is not asked for its numbers to read from disk."""
        return torch.device("cpu") if self.stored else self.device

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """position: (B,) int64, counted from the start of training -> x (B, ...), labels (B,) or None.

        Raises ValueError when stored rows are damaged.
        """
        return self._from_disk(position.cpu()) if self.stored else self.data.rows(*self.order(position), self.seed)

    def _from_disk(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        name = lambda p: (int(p[0]), int(p[-1]), len(p))
        coming = [position + k * self.stride for k in range(self.AHEAD + 1 if self.stride else 1)]
        kept = {name(p): self._ahead.get(name(p)) or self._thread.submit(self._read, p) for p in coming}
        for key, future in self._ahead.items():
            if key not in kept:
                future.cancel()
        self._ahead = kept
        stored, labels, index, epoch = (
            x if x is None else x.to(self.device, non_blocking=True) for x in self._ahead.pop(name(position)).result()
        )
        return self.data.finish(stored, index, epoch, self.seed), labels

    def _read(self, position: Tensor) -> tuple[Tensor | None, ...]:
        """On the thread, which alone touches the epochs' permutations."""
        index, epoch = self.order(position)
        labels = None if self.data.labels is None else self.data.labels[index]
        out = (self.data.read(index), labels, index, epoch)
        pin = self.device.type == "cuda"
        if pin:
            torch.cuda.set_device(self.device)  # a thread begins on device 0, whichever is the process's
        return tuple(x.pin_memory() if pin and x is not None else x for x in out)

    def close(self) -> None:
        """End the background thread."""
        if self.stored:
            self._thread.shutdown(wait=False, cancel_futures=True)


def check_loader(config: Feed, data: Rows) -> None:
    """Raises ConfigError when this loader cannot feed this data here; only training asks."""
    if config.kind == "dali":
        from cmt_fast.data import dali

        dali.check(data)


def loader(config: Feed, data: Rows, seed: int, device: torch.device, stride: int) -> Loader:
    """The loader a recipe names; whichever it is, the rows are the same. stride: rows a step over all ranks."""
    if config.kind == "dali":
        from cmt_fast.data import dali

        return dali.DaliLoader(data, seed, device, stride, config)
    return Loader(data, seed, device, stride)
