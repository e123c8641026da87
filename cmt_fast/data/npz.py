"""Images of one's own in a NumPy .npz file: `images` (N, C, H, W) and optionally `labels` (N,)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Npz
from cmt_fast.data import arrays, classes, values
from cmt_fast.data.classes import MOST, Classes
from cmt_fast.data.rows import Dataset
from cmt_fast.storage import files


def load(config: Npz, table: int | None = None) -> Dataset:
    """x: (N, C, H, W) float32; uint8 is scaled to [-1, 1]. Raises ConfigError naming the key and what is wrong.

    Numbers that cannot be meant as they are, by the rules of data/values.py, are refused unless data.unchecked. table: as of
    datasets.load. Labels that reach to its last class stay as they are, as a run begun with them has them.
    """
    try:
        found = arrays.read(Path(config.path), ("images", "labels"))
        images, labels = found["images"], found.get("labels")
    except FileNotFoundError:
        raise ConfigError(f"data.path: {config.path!r} does not exist") from None
    except KeyError:
        raise ConfigError(f"data.path: {config.path!r} has no array called 'images'") from None
    except (OSError, arrays.NoArrays) as error:
        raise ConfigError(f"data.path: {config.path!r} is no .npz file without pickles ({error})") from None
    images = _shaped(images, config)
    if images.dtype not in (np.uint8, np.float32):
        raise ConfigError(
            f"data.path: images of {config.path!r} are {images.dtype}, not uint8 or float32 (images.astype(np.float32))"
        )
    if not np.isfinite(images).all():
        raise ConfigError(f"data.path: images of {config.path!r} are not all finite")
    x = _scaled(images, config)
    if not config.unchecked:
        _check(images, x, config)
    checksum = files.checksum(Path(config.path))
    own = Classes(None, 0)
    if labels is not None:
        wrong = _wrong(labels, len(images))
        if wrong:
            raise ConfigError(f"data.path: labels of {config.path!r} {wrong}")
        numbers = labels.astype(np.int64).tolist()
        as_they_are = table == max(numbers) + 1 and config.class_ids is None
        kept, ids = (numbers, ()) if as_they_are else classes.dense(numbers)
        own = Classes(torch.tensor(kept), max(kept) + 1, ids=ids)
    own = classes.settled(own, config.class_ids, config.classes, f"{config.path!r}")
    return Dataset(x, own.labels, own.classes, checksum, own.names, own.ids)


def _wrong(labels: np.ndarray, n: int) -> str:
    """What labels are that are not one class number a row, and what would make them so; "" for those that are."""
    if labels.dtype.kind in "USO":
        return "are text; store their numbers: np.unique(labels, return_inverse=True)[1]"
    if labels.ndim == 2 and labels.shape == (n, 1) and labels.dtype.kind in "iu":
        return f"have the shape {labels.shape}, not (N,); store labels[:, 0]"
    if labels.ndim == 2 and len(labels) == n and np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all():
        return f"are one-hot {labels.shape}, not (N,); store labels.argmax(1)"
    if labels.shape != (n,):
        return f"have the shape {labels.shape} for {n} images, not ({n},)"
    if labels.dtype.kind not in "iu":
        return f"are {labels.dtype}, not whole numbers; store labels.astype(np.int64) if they are class numbers"
    if labels.min() < 0 or labels.max() >= MOST:
        return f"reach from {labels.min()} to {labels.max()}; a class is a number from 0 to {MOST - 1}"
    return ""


def _shaped(images: np.ndarray, config: Npz) -> np.ndarray:
    """(N, C, H, W) of what the file holds. Raises ConfigError naming the key."""
    shape, what = images.shape, f"images of {config.path!r} have the shape {images.shape}"
    if images.ndim == 3:
        raise ConfigError(f"data.path: {what}, not (N, C, H, W); of grey images it is images[:, None]")
    if images.ndim != 4 or not images.size:
        raise ConfigError(f"data.path: {what}, not (N, C, H, W)")
    if config.layout == "hwc":
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if values.last_axis(shape[1:]) and not config.unchecked:
        raise ConfigError(f"data.layout: {what}, that is (N, H, W, C), channels last; data.layout=hwc reads them so")
    return images


def _scaled(images: np.ndarray, config: Npz) -> Tensor:
    """float32 with data.range, or 0 and 255 of uint8, brought to -1 and 1. Raises ConfigError naming the key."""
    x = torch.from_numpy(images).float()
    low, high = config.range or (0.0, 255.0)
    if not low < high:
        raise ConfigError(f"data.range: {low:g} is not below {high:g}")
    if config.range:
        return (x - low) * (2 / (high - low)) - 1
    return x / 127.5 - 1 if images.dtype == np.uint8 else x


def _check(images: np.ndarray, x: Tensor, config: Npz) -> None:
    """Raises ConfigError naming the key that would mend numbers which cannot be meant as they are."""
    parts = lambda rows: (rows[i : i + 1024] for i in range(0, len(rows), 1024))
    stored, scaled = values.spread(parts(images)), values.spread(parts(x.numpy()))
    what = f"images of {config.path!r} have {stored.text()}"
    kept = "data.unchecked=true takes them as they are"
    if wrong := values.flat(scaled):
        tip = "data.range=[0, 1] if that is black and white; " if (stored.low, stored.high) == (0, 1) else ""
        raise ConfigError(f"data.{'range' if tip else 'unchecked'}: {what}: {wrong}; {tip}{kept}")
    wrong, (low, high) = (found := values.seen(scaled))[0], found[1] or (0.0, 0.0)
    if wrong:
        tip = f"data.range=[{low:.5g}, {high:.5g}] brings these two to -1 and 1"
        if config.range:
            what, tip = (
                f"{what}, and {scaled.text()} after data.range={list(config.range)}",
                "give the range that they have",
            )
        raise ConfigError(f"data.range: {what}: {wrong}; {tip}; {kept}")
