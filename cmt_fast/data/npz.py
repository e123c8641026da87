"""Images of one's own in a NumPy .npz file: `images` (N, C, H, W) and optionally `labels` (N,)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from cmt_fast.config.schema import Npz
from cmt_fast.data import classes
from cmt_fast.data.classes import Classes
from cmt_fast.data.rows import Dataset
from cmt_fast.storage import files

MOST = 1 << 20  # classes


def load(config: Npz, table: int | None = None) -> Dataset:
    """x: (N, C, H, W) float32; uint8 is scaled to [-1, 1]. Raises ValueError naming the key and what is wrong.

    table: as of datasets.load. Labels that reach to its last class stay as they are, as a run begun with them has them.
    """
    try:
        with np.load(config.path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"] if "labels" in file else None
    except FileNotFoundError:
        raise ValueError(f"data.path: {config.path!r} does not exist") from None
    except KeyError:
        raise ValueError(f"data.path: {config.path!r} has no array called 'images'") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.path: {config.path!r} is no .npz file without pickles ({error})") from None
    if images.ndim != 4 or not len(images):
        raise ValueError(f"data.path: images of {config.path!r} have the shape {images.shape}, not (N, C, H, W)")
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"data.path: images of {config.path!r} are {images.dtype}, not uint8 or float32")
    x = torch.from_numpy(images).float()
    x = x / 127.5 - 1 if images.dtype == np.uint8 else x
    if not torch.isfinite(x).all():
        raise ValueError(f"data.path: images of {config.path!r} are not all finite")
    checksum = files.checksum(Path(config.path))
    own = Classes(None, 0)
    if labels is not None:
        wrong = _wrong(labels, len(images))
        if wrong:
            raise ValueError(f"data.path: labels of {config.path!r} {wrong}")
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
