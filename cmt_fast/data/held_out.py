"""Some rows of a data set kept from training, and the others as a data set of their own.

Whole images are kept: where mirror images are rows too, an image and its mirror image are on the same side. Which ones is a
function of (seed, number of images) alone, whatever the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmt_fast.data.rows import Dataset, Rows
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.rng import Random


class Part:
    """The rows `kept` (n,) int64 of data on disk, as data.Stored. Draws of a row are those that it has in the whole."""

    def __init__(self, whole: Any, kept: Tensor) -> None:
        self.whole, self.kept = whole, kept
        self.n, self.shape, self.classes = len(kept), whole.shape, whole.classes
        self.labels = None if whole.labels is None else whole.labels[kept]

    @property
    def facts(self) -> dict[str, int | str]:
        """As Rows: of the whole, and how many of its rows these are."""
        return {**self.whole.facts, "kept": self.n}

    def order(self, random: Random) -> Tensor:
        """An epoch's order, (n,): uniform, or what the whole's own order (data/shards.py) leaves of these rows."""
        own = getattr(self.whole, "order", None)
        if own is None:
            return random.permutation(rng.DATA, self.n)
        place = torch.full((self.whole.n,), -1, dtype=torch.int64)
        place[self.kept] = torch.arange(self.n)
        found = place[own(random).cpu()]
        return found[found >= 0]

    def read(self, index: Tensor) -> Tensor:
        """As data.Stored."""
        return self.whole.read(self.kept[index])

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor:
        """As data.Stored."""
        return self.whole.finish(stored, self.kept.to(index.device)[index], draw, seed)

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As data.Rows."""
        return self.whole.rows(self.kept.to(index.device)[index], draw, seed)


def split(data: Rows, share: float, seed: int) -> tuple[Rows, Tensor]:
    """The rows to train on, and which rows (m,) of `data` are kept from it: round(share images) images, mirrored ones too.

    Raises ValueError where one of the two would have no row.
    """
    if not share:
        return data, torch.empty(0, dtype=torch.int64)
    images = getattr(data, "images", data.n)
    held = round(share * images)
    if not 0 < held < images:
        raise ValueError(f"{share:g} of {images:,} images are {held:,}: neither none nor all can be held out")
    out = torch.zeros(images, dtype=torch.bool)
    out[Random(seed, 0, 0).permutation(rng.HELD_OUT, images)[:held]] = True
    out = out.repeat(data.n // images)
    rest = torch.nonzero(~out)[:, 0]
    if isinstance(data, Dataset):
        labels = None if data.labels is None else data.labels[rest]
        return data._replace(x=data.x[rest], labels=labels), torch.nonzero(out)[:, 0]
    return Part(data, rest), torch.nonzero(out)[:, 0]
