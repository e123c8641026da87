"""Images of one's own in a NumPy .npz file: `images` (N, C, H, W) and optionally `labels` (N,)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from cmt_fast.config.schema import Npz
from cmt_fast.data.rows import Dataset
from cmt_fast.storage import files


def load(config: Npz) -> Dataset:
    """x: (N, C, H, W) float32; uint8 is scaled to [-1, 1]. Raises ValueError naming the key and what is wrong."""
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
    if labels is None:
        return Dataset(x, None, 0, checksum)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"data.path: labels of {config.path!r} are {labels.dtype} {labels.shape}, not (N,) from 0")
    return Dataset(x, torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1, checksum)
