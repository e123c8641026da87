"""What judging needs of real data, as files of the run: RUN/reference/KEY.safetensors and KEY.json.

Taken (keeping.py) by the first that judges while the data are here, read by all others, wherever the data are: a run that was
copied elsewhere is judged, and its report drawn, without its data. Nothing in them is a pickle. They hold the moments of both
feature spaces, features of at most 10,000 rows for precision and recall, projections for the sliced distance, the
sharpness, real rows for the picture, and figures of real rows against real rows (the floor), by number of samples.

They are of one key: the rows, the metric, the features, the reference file, the law of labels. Another key has other files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmt_fast.evaluation import sharpness
from cmt_fast.evaluation.distances import Moments
from cmt_fast.evaluation.second import Second
from cmt_fast.storage import files, sound

FOLDER, FORMAT = "reference", 1
OWN = "own_xxh3_128"  # of the JSON itself, whose xxh3_128 is that of the tensors beside it
MOST = 1 << 36  # bytes of tensors
ROWS = 10_000  # whose features are kept, at most
SHOWN, POINTS = 10, 1500  # real rows for the picture: images, points


class Kept(NamedTuple):
    """about: key, n, source, labels, second, floor; tensors: mu, sigma, mu_2, sigma_2, features, features_2, fitted.*,
    projected, weights, high_energy, shown, each where there is one.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def moments(self) -> Moments:
        """Of the first space."""
        return Moments(self.tensors["mu"], self.tensors["sigma"])

    @property
    def moments_2(self) -> Moments:
        """Of the second."""
        return Moments(self.tensors["mu_2"], self.tensors["sigma_2"])

    @property
    def second(self) -> Second:
        """The second space, as it was fitted."""
        own = {k.removeprefix("fitted."): v for k, v in self.tensors.items() if k.startswith("fitted.")}
        return Second(tuple(self.about["shape"]), own)

    @property
    def sharpness(self) -> float | None:
        """The share of energy of real rows in high frequencies, None of rows that are no images."""
        return sharpness.share(self.tensors["high_energy"]) if "high_energy" in self.tensors else None


def read(folder: Path, key: dict[str, Any]) -> Kept | None:
    """What a run's folder keeps under this key; None where it keeps nothing, something else, or a file is damaged.

    A key of which a part is None fits whatever stands there: what cannot be looked up where the data, or a file, are not.
    """
    for file in _files(folder):
        try:
            about = _about(file)
            if _fits(key, about["key"]):
                tensors = load(_data(file, about))  # which lie in the file's bytes, at any address
                return Kept(about, {name: tensor.clone() for name, tensor in tensors.items()})
        except (ValueError, SafetensorError):
            continue
    return None


def wrong(folder: Path) -> str:
    """What is wrong with what a run's folder keeps, a phrase; empty where nothing is."""
    for file in _files(folder):
        try:
            _data(file, _about(file))
        except ValueError as error:
            return str(error)
    return ""


def checked(file: Path) -> None:
    """Raises ValueError, a phrase, where what is kept under this name is not what was written."""
    _data(file, _about(file))


def _files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.json"))


def _about(file: Path) -> dict[str, Any]:
    """What a file says of the tensors beside it. Raises ValueError, a phrase, where it cannot be read."""
    try:
        about = sound.read(file, key=OWN)
        form, key, _ = about["format"], about["key"], about["xxh3_128"]
        whole = isinstance(key, dict) and isinstance(about["floor"], dict)
        if not whole or not all(f is None or isinstance(f, dict) for f in about["floor"].values()):
            raise TypeError(key)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{file.with_suffix('')} is damaged") from None
    if form != FORMAT:
        raise ValueError(f"{file} has format {form}, this version reads {FORMAT}")
    return about


def _data(file: Path, about: dict[str, Any]) -> bytes:
    """The tensors, as they were written. Raises ValueError, a phrase."""
    try:
        data = sound.data(file.with_suffix(".safetensors"), MOST)
    except (OSError, sound.Unsound):
        data = b""
    if xxhash.xxh3_128(data).hexdigest() != about["xxh3_128"]:
        raise ValueError(f"{file.with_suffix('')} is damaged")
    return data


def _fits(key: Any, theirs: Any) -> bool:
    if isinstance(key, dict) and isinstance(theirs, dict):
        return all(_fits(v, theirs.get(k)) for k, v in key.items())
    return key is None or key == theirs


def write(folder: Path, kept: Kept) -> None:
    """Both files, each whole or not there; the checksum in the second says that they belong together."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    name = xxhash.xxh3_64(json.dumps(kept.about["key"], sort_keys=True).encode()).hexdigest()
    data = save({k: v.contiguous() for k, v in kept.tensors.items()})
    kept.about["xxh3_128"] = xxhash.xxh3_128(data).hexdigest()
    for ending, content in (("safetensors", data), ("json", sound.signed(kept.about, OWN).encode())):
        files.write_bytes(folder / FOLDER / f"{name}.{ending}", content)
