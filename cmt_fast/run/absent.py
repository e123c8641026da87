"""The rows of a store that is not here, as far as its recipe says what they must be like."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Latents, Run
from cmt_fast.data import classes as in_data
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.datasets import load
from cmt_fast.data.rows import Rows


class AbsentRows:
    """No rows: their shape, their classes, and their normalisation where the recipe gives it. For what reads no data.

    `known` is what a run may keep of them. Classes are those of the network's table of labels: what `data.class_ids` and
    `data.classes` make of those expected, or those given where the recipe leaves them open, a checkpoint's own.
    Raises ConfigError for a mean that is not of the shape, and for classes that cannot be.
    """

    def __init__(self, config: Latents, classes: int = 0) -> None:
        assert config.expects is not None
        self.n, self.path = 0, config.path
        self.labels: Tensor | None = None
        self.scale = config.scale
        self.facts: dict[str, int | str] = {}
        self.shape: tuple[int, ...] = tuple(config.expects.shape)
        said = in_data.expected(config.class_ids, config.classes, config.expects.classes)
        self.classes = classes if said is None else said
        self.known: dict = {"shape": list(self.shape)}
        if said is not None or classes:
            self.known["classes"] = self.classes
        self.normalisation = None
        if config.mean is not None and config.std is not None:
            if {len(config.mean), len(config.std)} != {self.shape[0]}:
                raise ConfigError(
                    f"data.mean and data.std: need {self.shape[0]} numbers each, one a channel of data.expects"
                )
            self.normalisation = Normalisation(config.mean, config.std, config.scale)
            self.known["normalisation"] = [list(config.mean), list(config.std), config.scale]

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As data.Rows. Raises ConfigError."""
        raise ConfigError(f"data.path: {self.path!r} is not a folder")


def rows(run: Run, classes: int = 0) -> Rows:
    """A run's data; where its store is not here and the recipe says what it expects, that in their place.

    classes: of rows whose recipe expects any. Raises ConfigError naming the key when they cannot be had.
    """
    if isinstance(run.data, Latents) and run.data.expects is not None and not Path(run.data.path).exists():
        return AbsentRows(run.data, classes)
    try:
        return load(run.data)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
