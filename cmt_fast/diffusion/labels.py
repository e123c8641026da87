"""Which class each sample is of: a function of the sample's index alone, in the proportions that a law asks for.

Class k of share p_k has its j-th sample (j = 0, 1, ...) somewhere in the window [floor(j / p_k), ceil((j + 1) / p_k)) of
indices; of all windows that are open at an index, the one that closes first is served, among equals that of the lowest class.
This is the proportionate schedule of Baruah et al. (1996), which exists for any shares of sum 1, as in Tijdeman's chairman
assignment (1980): of the first n samples every class has n p_k, rounded down or up. So any number of samples follows the
law, after sum_k n_k of them the counts are exact and the sequence begins again, and equal shares go round the classes in
order, index mod K. Nothing is random and all of it is whole numbers: batches, ranks and machines give the same labels.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Some(NamedTuple):
    """Those classes of a table of `classes` that are drawn, each as often; the null class is the number `classes`."""

    labels: tuple[int, ...]
    classes: int


class Law:
    """counts (classes,): how often each class is drawn, in proportion; name: what is said of the law, as "data"."""

    def __init__(self, counts: Sequence[int] | Tensor, name: str) -> None:
        """Raises ValueError for a negative count, or where all are zero though there are classes."""
        self.counts, self.name = torch.as_tensor(counts, dtype=torch.int64).cpu(), name
        if len(self.counts) and (int(self.counts.min()) < 0 or not int(self.counts.max())):
            raise ValueError(f"counts of classes: {int(self.counts.min())} to {int(self.counts.max())} are no shares")
        self.present = self.counts.nonzero()[:, 0]
        self._of = self.counts[self.present]
        self._first = torch.empty(0, dtype=torch.int64)

    @classmethod
    def uniform(cls, classes: int | Tensor, table: int = 0, name: str = "uniform") -> Law:
        """Equal shares of `classes` classes, or of those given (K,) among `table` ones."""
        chosen = torch.arange(classes) if isinstance(classes, int) else classes
        counts = torch.zeros(table or len(chosen), dtype=torch.int64)
        counts[chosen] = 1
        return cls(counts, name)

    @property
    def even(self) -> bool:
        """Whether all classes that are drawn are drawn equally often."""
        return not len(self._of) or bool((self._of == self._of[0]).all())

    @property
    def shares(self) -> Tensor:
        """(classes,) float64, of sum 1."""
        return self.counts.double() / self.counts.sum()

    def __call__(self, index: Tensor) -> Tensor | None:
        """index: (n,) int64 -> labels (n,) there; None where there are no classes."""
        if not len(self.counts):
            return None
        if self.even:
            place = index % len(self.present)
            return place if len(self.present) == len(self.counts) else self.present.to(index.device)[place]
        # after so many samples all counts are exact, no window is open, and the sequence begins again
        total = int(self._of.sum())
        place = index % total
        if len(index) and int(place.max()) >= len(self._first):
            self._first = self._beginning(min(total, max(1024, 2 * int(place.max()) + 2)))
        return self._first.to(index.device)[place]

    def _beginning(self, n: int) -> Tensor:
        """The first n labels of the sequence, by earliest deadline among the windows that are open."""
        counts, total, out = self._of.tolist(), int(self._of.sum()), []
        coming = [(0, k, 0) for k in range(len(counts))]  # where a window opens, its class, which sample of it
        ready: list[tuple[int, int, int]] = []  # where it closes, class, sample
        for index in range(n):
            while coming and coming[0][0] <= index:
                _, k, j = heapq.heappop(coming)
                heapq.heappush(ready, (-(-(j + 1) * total // counts[k]), k, j))
            _, k, j = heapq.heappop(ready)
            out.append(k)
            heapq.heappush(coming, ((j + 1) * total // counts[k], k, j + 1))
        return self.present[torch.tensor(out)]

    def text(self) -> str:
        """What a record says: `uniform over 10 classes`, `data: 3 classes, 2.4 % to 80 %`, `none`."""
        if not len(self.counts):
            return "none"
        n = f"{len(self.present)} class{'es' * (len(self.present) > 1)}"
        if self.name == "uniform":
            return f"uniform over {n}"
        low, high = (100 * int(v) / int(self._of.sum()) for v in (self._of.min(), self._of.max()))
        return f"{self.name}: {n}" + ("" if len(self.present) == 1 else f", {low:.3g} % to {high:.3g} %")
