"""Rows that are not here: as far as a recipe says what they must be like, or as the run remembers that was trained on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Data, Latents, Run
from cmt_fast.data import classes as in_data
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.datasets import load
from cmt_fast.data.rows import Rows
from cmt_fast.diffusion.labels import Law
from cmt_fast.run.decoding import Encoded
from cmt_fast.run.folder import about_run


class AbsentRows:
    """No rows: their shape, their classes, and their normalisation where the recipe gives it. For what reads no data.

    `known` is what a run may keep of them. Classes are those of the network's table of labels: what `data.class_ids` and
    `data.classes` make of those expected, or those given where the recipe leaves them open, a checkpoint's own.
    Raises ConfigError for a mean that is not of the shape, and for classes that cannot be.
    """

    here = False

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
            given = Normalisation.of(config.mean, config.std, config.scale, self.shape[0])
            if {len(given.mean), len(given.std)} != {self.shape[0]}:
                raise ConfigError(
                    f"data.mean and data.std: need {self.shape[0]} numbers each, one a channel of data.expects"
                )
            self.normalisation = given
            self.known["normalisation"] = [list(given.mean), list(given.std), given.scale]

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As data.Rows. Raises ConfigError."""
        raise ConfigError(f"data.path: {self.path!r} is not a folder")


class RememberedRows:
    """The rows that a run was trained on, as its run.json has them; the rows themselves are opened where they are first read.

    n, shape, classes, class_names, class_ids, facts, normalisation: as of the rows. labels: as many of each class, in no
    order; None where nobody counted them. encoded: of latents, see Decoding. law: (eval.labels, its name, counts) as kept.
    old: the version that trained the run kept no counts.
    """

    def __init__(self, config: Data, about: dict[str, Any]) -> None:
        """about: run.json, which has `rows`; what later versions keep may be missing. Raises KeyError without `rows`."""
        known, more = about["rows"], about.get("remembered") or {}
        self.config, self.facts, self.old = config, about.get("data") or {}, "remembered" not in about
        self._found: Rows | ConfigError | None = None
        self.n: int = more.get("n", self.facts.get("rows", 0))
        self.shape: tuple[int, ...] = tuple(known["shape"])
        self.classes: int = known.get("classes") or 0
        self.class_names, self.class_ids = tuple(more.get("class_names", ())), tuple(known.get("class_ids", ()))
        counts = more.get("counts")
        self.labels = torch.arange(self.classes).repeat_interleave(torch.tensor(counts)) if counts else None
        n = known.get("normalisation")
        self.normalisation = Normalisation(tuple(n[0]), tuple(n[1]), n[2]) if n else None
        self.encoded = _encoded(more.get("encoded"), self, config)
        self.law: dict[str, Any] = more.get("law") or {}

    @property
    def whole(self) -> bool:
        """Whether all is known of them that sampling and judging ask for."""
        return bool(self.facts) and (not self.classes or self.labels is not None)

    @property
    def here(self) -> bool:
        """Whether the rows can be had, which opens them."""
        if self._found is None:
            self._found = self._open()
        return not isinstance(self._found, ConfigError)

    def opened(self) -> Rows:
        """The rows, which are those that the run was trained on. Raises ConfigError where they are not here."""
        if self.here:
            return cast(Rows, self._found)
        raise cast(ConfigError, self._found)

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As data.Rows. Raises ConfigError as `opened`."""
        return self.opened().rows(index, draw, seed)

    def _open(self) -> Rows | ConfigError:
        """The rows, or what is said of them."""
        where = getattr(self.config, "path", None)
        try:
            found = load(self.config, self.classes)
            if not self.facts or found.facts == self.facts:
                return found
            why = "holds other rows than this run was trained on"
        except (ValueError, OSError) as error:
            why = "is not here" if where and not os.path.exists(where) else f"cannot be read ({error})"
        if where:
            return ConfigError(
                f"data.path: {where!r} {why}, and this needs its rows; say where they are, or do it where they are"
            )
        return ConfigError(f"data.kind: {self.config.kind!r} {why}, and this needs its rows; do it where they are")


def _encoded(kept: dict[str, Any] | None, data: RememberedRows, config: Data) -> Encoded | None:
    """What latents are, as kept; of those whose store never was here, as their recipe has them."""
    if kept:
        return Encoded(kept["vae"], kept["vae_xxh3_128"], tuple(kept["mean"]), tuple(kept["std"]))
    n = data.normalisation
    if data.n or n is None or not isinstance(config, Latents) or data.shape[0] in (1, 3):
        return None
    return Encoded("", "", n.mean, n.std)


def remembered(config: Data, folder: Path) -> RememberedRows | None:
    """What the run in a folder remembers of its rows; None where that is nothing."""
    try:
        return RememberedRows(config, about_run(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def uncounted(folder: Path) -> str:
    """What is to be known of samples of a run that kept no counts of its classes, where its data are not here."""
    return (
        f"{folder} is of a version that kept no counts of its classes, and its data are not here: labels are uniform, not in "
        "the data's proportions"
    )


def memory(data: Rows, law: Law, labels: str, encoded: Encoded | None) -> dict[str, Any]:
    """What run.json keeps of rows beside their shape, classes and normalisation. labels: of `eval`, whose law that is."""
    counted = data.labels is not None
    return {
        "n": data.n,
        "counts": in_data.counts(data).tolist() if counted else None,
        "class_names": list(getattr(data, "class_names", ())),
        "encoded": encoded._asdict() if encoded else None,
        "law": {"labels": labels, "name": law.name, "counts": law.counts.tolist()},
    }


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
