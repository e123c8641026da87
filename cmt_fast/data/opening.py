"""A store from its folder or from a recipe, whichever form its rows have."""

from __future__ import annotations

import math
from pathlib import Path

from cmt_fast.config.schema import Latents
from cmt_fast.data import classes, start, values
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.latents import Store, read_index
from cmt_fast.data.shards import Shards

CENTRE = 3.0  # of a channel, as networks see it


def opened(folder: Path, flip: bool = False, normalisation: Normalisation | None = None) -> Store:
    """The store in a folder, its rows in plain files or in WebDataset shards. Raises DatasetError as Store does."""
    read = start.reader()
    if read_index(folder, read).shards[0].file.endswith(".tar"):
        return Shards(folder, flip, normalisation, read)
    return Store(folder, flip, normalisation, read)


def load(config: Latents) -> Store:
    """The store a recipe names, or its copy on this machine (data/start.py). Raises DatasetError naming the key or file."""
    if (config.mean is None) != (config.std is None):
        raise DatasetError(f"data.{'mean' if config.mean is None else 'std'}: is missing, mean and std go together")
    if not Path(config.path).is_dir():
        raise DatasetError(f"data.path: {config.path!r} is not a folder")
    store = opened(Path(config.path), config.flip)
    if store.index.trajectories:
        raise DatasetError(f"data.path: {config.path} holds trajectories; they are for a stage's trajectories.cache")
    stored = store.classes
    own = classes.settled(classes.of(store), config.class_ids, config.classes, config.path)
    store.relabel(own)
    wanted = config.expects
    if wanted and store.shape != wanted.shape:
        raise DatasetError(f"data.expects.shape: {config.path} holds rows of {store.shape}, not {wanted.shape}")
    if wanted and wanted.classes not in (None, stored, store.classes):
        if not store.classes:
            raise DatasetError(
                f"data.expects.classes: {config.path} has no labels, and the recipe is of {wanted.classes} classes; encode class "
                "folders or import labels, or set data.expects.classes=0 to train without labels"
            )
        hint = classes.asks(store, wanted.classes or 0)
        raise DatasetError(
            f"data.expects.classes: {config.path} has {store.classes} classes, not {wanted.classes}; {hint}"
        )
    if config.mean is not None and config.std is not None:
        given = Normalisation.of(config.mean, config.std, config.scale, store.shape[0])
        store = opened(Path(config.path), config.flip, given)
        store.relabel(own)
    elif store.index.kind != "pixels":
        store.normalisation = store.normalisation._replace(scale=config.scale)
    if not config.unchecked:
        _check(store, given=config.mean is not None)

    def reopen(folder: Path) -> Store:
        near = opened(folder, config.flip, store.normalisation)
        near.relabel(own)
        return near

    return start.nearby(store, reopen)


def _check(store: Store, given: bool) -> None:
    """Raises DatasetError where the statistics of the index, which are those of all rows, say that the numbers cannot be
    meant as they are. given: whether mean and std are the recipe's.
    """
    index, n = store.index, store.normalisation
    have = values.Spread(math.nan, math.nan, index.mean, index.std)
    kept = "data.unchecked=true takes it as it is"
    if not given:
        if wrong := values.flat(have, 0.5 if index.kind == "pixels" else 0.0):
            tip = "" if index.kind == "pixels" else "; data.mean and data.std set what each channel is normalised by"
            raise DatasetError(f"data.path: {store.folder} has {have.text()}: {wrong}{tip}; {kept}")
        return
    scaled = zip(index.mean, index.std, n.mean, n.std)
    mean, std = zip(*((n.scale * (m - m0) / s0, n.scale * s / s0) for m, s, m0, s0 in scaled))
    z = values.Spread(math.nan, math.nan, mean, std)
    (low, high), dark = values.SEEN, index.kind == "pixels"  # images may be as dark and flat as they like
    if (low <= z.all or dark) and z.all <= high and max(map(abs, mean)) <= CENTRE:
        return
    tip = f"data.scale={n.scale * 0.5 / z.all:.3g} makes the std 0.5; " if max(map(abs, mean)) <= CENTRE * z.all else ""
    raise DatasetError(
        f"data.scale: {store.folder} has {have.text()}; after data.mean, data.std and data.scale={n.scale:g} that is "
        f"{z.text()}, where a mean near 0 and a std of 0.5 to 1 are meant; {tip}without data.mean and data.std the store's own "
        f"bring each channel to mean 0 and std data.scale; {kept}"
    )
