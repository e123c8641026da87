"""The data set that a recipe names, opened."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmt_fast.config.schema import Data
from cmt_fast.data import classes
from cmt_fast.data.rows import Dataset, Rows, opened


def load(config: Data, table: int | None = None) -> Rows:
    """The data set a recipe names. Raises ValueError naming the key when it cannot be had.

    table: classes of the network that a run on record has, whose npz file may have had its labels as they were.
    """
    from cmt_fast.data import digits, gmm, npz, opening, photos

    loaders: dict[str, Callable] = {
        "digits": digits.load, "photos": photos.load, "gmm": gmm.load, "latents": opening.load,
    }  # fmt: skip
    return npz.load(config, table) if config.kind == "npz" else loaders[config.kind](config)


def in_memory(data: Rows, limit: int = 10_000) -> Dataset:
    """Small data as they are; of data on disk the first draw of at most `limit` rows, evenly spaced."""
    data = opened(data)
    if isinstance(data, Dataset):
        return data
    index = torch.arange(min(data.n, limit)) * data.n // min(data.n, limit)
    parts = [data.rows(i, torch.zeros_like(i)) for i in index.split(256)]
    labels = None if data.labels is None else data.labels[index]
    own = classes.of(data)
    return Dataset(torch.cat([x for x, _ in parts]), labels, own.classes, "", own.names, own.ids)
