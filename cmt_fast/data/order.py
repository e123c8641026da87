"""The order of rows, and a loader that reads them ahead by a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cmt_fast.data.rows import Dataset, Rows
from cmt_fast.diffusion.rng import DATA, Random


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
