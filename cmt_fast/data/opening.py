"""A store from its folder or from a recipe, whichever form its rows have."""

from __future__ import annotations

from pathlib import Path

from cmt_fast.config.schema import Latents
from cmt_fast.data import classes
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.latents import Store, read_index
from cmt_fast.data.shards import Shards


def opened(folder: Path, flip: bool = False, normalisation: Normalisation | None = None) -> Store:
    """The store in a folder, its rows in plain files or in WebDataset shards. Raises DatasetError as Store does."""
    if read_index(folder).shards[0].file.endswith(".tar"):
        return Shards(folder, flip, normalisation)
    return Store(folder, flip, normalisation)


def load(config: Latents) -> Store:
    """The store a recipe names. Raises DatasetError naming the key or file."""
    if (config.mean is None) != (config.std is None):
        raise DatasetError(f"data.{'mean' if config.mean is None else 'std'}: is missing, mean and std go together")
    if not Path(config.path).is_dir():
        raise DatasetError(f"data.path: {config.path!r} is not a folder")
    store = opened(Path(config.path), config.flip)
    if store.index.trajectories:
        raise DatasetError(f"data.path: {config.path} holds trajectories; they are for a stage's trajectories.cache")
    own = classes.settled(classes.of(store), config.class_ids, config.classes, config.path)
    store.relabel(own)
    wanted = config.expects
    if wanted and store.shape != wanted.shape:
        raise DatasetError(f"data.expects.shape: {config.path} holds rows of {store.shape}, not {wanted.shape}")
    if wanted and wanted.classes not in (None, store.classes):
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
        store = opened(Path(config.path), config.flip, Normalisation(config.mean, config.std, config.scale))
        store.relabel(own)
        return store
    if store.index.kind != "pixels":
        store.normalisation = store.normalisation._replace(scale=config.scale)
    return store
