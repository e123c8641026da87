"""The loader that a recipe names: torch ahead by a thread, or NVIDIA DALI."""

from __future__ import annotations

import torch

from cmt_fast.config.schema import Feed
from cmt_fast.data.order import Loader
from cmt_fast.data.rows import Rows


def check_loader(config: Feed, data: Rows) -> None:
    """Raises ConfigError when this loader cannot feed this data here; only training asks."""
    if config.kind == "dali":
        from cmt_fast.data import dali

        dali.check(data)


def loader(config: Feed, data: Rows, seed: int, device: torch.device, stride: int, together: int = 1) -> Loader:
    """The loader a recipe names; whichever it is, the rows are the same. stride: rows a step over all ranks.

    together: rows of one class that follow each other, of the torch loader alone.
    """
    if config.kind == "dali":
        from cmt_fast.data import dali

        return dali.DaliLoader(data, seed, device, stride, config)
    return Loader(data, seed, device, stride, together)
