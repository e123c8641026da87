"""Windows cut out of six colour photographs that come inside scikit-learn and scikit-image: 3,600 images of 32 x 32.

Nothing is downloaded and neither package is imported: the image files lie in what pip installed. A class is a photograph. Of
each, square windows of six sizes are cut on an even grid that reaches from edge to edge, and reduced to 32 x 32. A network
that is trained on them learns to draw views of these six photographs; it sees nothing else, so it knows no other cat. That
is enough to show colours, shapes and textures, and what each training stage does to them.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from cmt_fast.config.schema import Photos
from cmt_fast.data.rows import Dataset
from cmt_fast.render import grids

SIDE = 32
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the photograph's shorter side that a window has
PLACES = 10  # along each side, from edge to edge


class Photo(NamedTuple):
    """A photograph: its class, the package that carries it, its file there, xxh3_64 of the file as these rows were made; who made
    it and on what terms it may be used (docs/data.md has the links).
    """

    name: str
    package: str
    file: str
    hash: str
    author: str
    rights: str


PHOTOS = (
    Photo("pagoda", "sklearn", "datasets/images/china.jpg", "11542ce03b91d8d0", "danielbuechele", "CC BY 2.0"),
    Photo("dahlia", "sklearn", "datasets/images/flower.jpg", "cbed8d50bd03e09b", "vultilion", "CC BY 2.0"),
    Photo("astronaut", "skimage", "data/astronaut.png", "0fabd6012e63326b", "NASA", "public domain"),
    Photo("cat", "skimage", "data/chelsea.png", "c92410a5ace9e478", "Stefan van der Walt", "CC0"),
    Photo("coffee", "skimage", "data/coffee.png", "d5097d427020b37a", "Rachel Michetti, Pikolo Espresso Bar", "CC0"),
    Photo("rocket", "skimage", "data/rocket.jpg", "c2bd04adb578fbce", "SpaceX", "public domain"),
)
PIP = {"sklearn": "scikit-learn", "skimage": "scikit-image"}


def load(config: Photos) -> Dataset:
    """x: (3600, 3, 32, 32) in [-1, 1], labels (3600,), six classes with names.

    The checksum is of the pixels. Raises ValueError where a package or a photograph in it is missing, or is another one.
    """
    rows = _rows()
    x = torch.from_numpy(rows).float().div_(127.5).sub_(1.0)
    labels = torch.arange(len(PHOTOS)).repeat_interleave(len(rows) // len(PHOTOS))
    return Dataset(x, labels, len(PHOTOS), xxhash.xxh3_128_hexdigest(rows), tuple(p.name for p in PHOTOS))


@functools.cache
def _rows() -> np.ndarray:
    """(3600, 3, 32, 32) uint8, photograph by photograph."""
    return np.stack([row for photo in PHOTOS for row in _windows(_bytes(photo))])


def _bytes(photo: Photo) -> bytes:
    """A photograph's file. Raises ValueError as `load`."""
    found = importlib.util.find_spec(photo.package)
    pip = PIP[photo.package]
    if found is None or not found.origin:
        raise ValueError(f"data.kind: 'photos' reads {pip}, which is not installed: pip install {pip}")
    path = Path(found.origin).parent / photo.file
    if not path.is_file():
        raise ValueError(f"data.kind: 'photos' reads {path}, which this version of {pip} does not have")
    data = path.read_bytes()
    if xxhash.xxh3_64_hexdigest(data) != photo.hash:
        raise ValueError(f"data.kind: 'photos' reads {path}, which is not the photograph that the rows are cut from")
    return data


def _windows(data: bytes) -> list[np.ndarray]:
    """(3, 32, 32) uint8 each: size by size, from top to bottom, from left to right."""
    image, out = grids.read(data), []
    for share in SHARES:
        side = share * min(image.size)
        for top in np.linspace(0, image.height - side, PLACES):
            for left in np.linspace(0, image.width - side, PLACES):
                out.append(grids.pixels(grids.reduced(image, (left, top, left + side, top + side), SIDE)))
    return out
