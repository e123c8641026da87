"""The order of rows, and a loader that reads them ahead by a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.data.rows import Dataset, Rows
from cmt_fast.diffusion.rng import DATA, SETS, Random


class Order:
    """Which row each position is: every epoch a permutation, global over ranks, a function of (seed, epoch) alone.

    It is uniform over all rows, unless the data set has `order(random) -> (n,)` of its own, as archives have.
    """

    def __init__(self, data: Rows, seed: int, device: torch.device | str = "cpu") -> None:
        self.data, self.seed, self.device, self.length = data, seed, device, data.n
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position: (B,) int64, counted from the start of training -> row of the data set, epoch; (B,) both."""
        epoch, place = position // self.length, position % self.length
        wanted = epoch.unique().tolist()
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in wanted}
        index = torch.empty_like(position)
        for e in wanted:
            index[epoch == e] = self._epochs[e][place[epoch == e]]
        return index, epoch

    def _permutation(self, epoch: int) -> Tensor:
        random, own = Random(self.seed, 0, epoch), getattr(self.data, "order", None)
        return own(random).to(self.device) if own else random.permutation(DATA, self.data.n, self.device)


class ClassOrder(Order):
    """Rows of a class together: every `together` positions that begin at a multiple of it are rows of one class.

    An epoch is a shuffle of such sets; a class' rows are shuffled first, and those that fill no set wait for another epoch.
    """

    def __init__(self, data: Rows, seed: int, device: torch.device | str, together: int) -> None:
        """Raises ConfigError where a class has fewer rows than a set."""
        assert data.labels is not None
        self.together, self.labels = together, data.labels.to(device)
        rows = torch.bincount(data.labels)
        few = torch.nonzero((rows > 0) & (rows < together))[:, 0].tolist()
        if few:
            raise ConfigError(
                f"{together} rows of one class are a set, and class {few[0]} has {int(rows[few[0]])} rows; take fewer, or "
                "by_class false",
                "objective.group",
            )
        super().__init__(data, seed, device)
        self.length = int((rows // together).sum()) * together

    def _permutation(self, epoch: int) -> Tensor:
        rows = super()._permutation(epoch)
        labels = self.labels[rows]
        by_class = torch.argsort(labels, stable=True)
        rows, labels = rows[by_class], labels[by_class]
        first = torch.searchsorted(labels, labels)  # of a row's class
        place = torch.arange(len(rows), device=rows.device) - first
        size = torch.bincount(labels)[labels]
        full = place < torch.div(size, self.together, rounding_mode="floor") * self.together
        chunks = rows[full].view(-1, self.together)
        return chunks[Random(self.seed, 0, epoch).permutation(SETS, len(chunks), rows.device)].flatten()


class Loader:
    """Rows of a data set by position.

    Data in memory move to the device once. Data on disk are read by a background thread, which reads ahead for the
    next steps when it is told that positions advance by `stride` a step, and end in pinned memory where there is a GPU.
    """

    AHEAD = 3  # steps

    def __init__(self, data: Rows, seed: int, device: torch.device, stride: int = 0, together: int = 1) -> None:
        """together: rows of one class that follow each other, as ClassOrder; 1: any."""
        self.seed, self.device, self.stride = seed, device, stride
        self.data, self.stored = data, not isinstance(data, Dataset)
        self.order = Order(data, seed, self.place) if together == 1 else ClassOrder(data, seed, self.place, together)
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
