"""What is fuzzed: each reader of a file that others may have written, the errors that it declares, and files to begin with.

A target takes a folder to write in and the bytes of one case, prepares the file outside the guard, and reads it within. The
first byte of a case says how the rest is put together: as it is, or packed so that a checksum or an archive around it is sound,
since a reader that stops at the first checksum is tested no further. What is read in a process of its own (sandbox.py) is read
here by the same code in this process, where the audit hook sees it.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from bench.safety import guard, seeds
from bench.safety.packing import tarred, zipped
from cmt_fast.config import loading, scalars
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Npz
from cmt_fast.convert import files, telling
from cmt_fast.data import classes, importing, npz
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.opening import opened
from cmt_fast.evaluation import references, weights
from cmt_fast.perceptual import distance
from cmt_fast.render import grids
from cmt_fast.safe_pickle import pickles, sandbox
from cmt_fast.safe_pickle.opcodes import Refused
from cmt_fast.storage import checkpoint, tensor_file

LONGEST = 3_200  # characters of an error that a person is to read


class Target(NamedTuple):
    """one: reads a case (folder, bytes) under the guard; declared: what it may raise; begin: cases to begin with."""

    one: Callable[[Path, bytes], None]
    declared: tuple[type[Exception], ...]
    begin: Callable[[], list[bytes]]
    longest: int = 8192  # bytes of a case


class Undeclared(Exception):
    """An error that is told in more than one line, or in one that a terminal would act upon."""


def check(name: str, folder: Path, data: bytes) -> str:
    """Read one case: "" where it was read, else the line of the declared error.

    Raises whatever else the reader raised, Undeclared for a line that is none, guard.Forbidden.
    """
    target = TARGETS[name]
    try:
        target.one(folder, data)
    except target.declared as error:
        line = str(error)
        if not line or len(line) > LONGEST + 2 * len(str(folder)) or not line.isprintable():
            raise Undeclared(f"{type(error).__name__} says {line[:200]!r}") from error
        return line
    return ""


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _config(folder: Path, data: bytes) -> None:
    """Even: a recipe; odd: overrides of one, a line each."""
    how, body = data[:1], data[1:]
    if how and how[0] % 2:
        lines = body.decode("utf-8", "surrogateescape").split("\n")[:8]
        with guard.watched(folder):
            loading.load("digits", lines)
        return
    path = _written(folder / "recipe.yaml", body)
    with guard.watched(folder):
        loading.dump(loading.load(str(path)))


def _words(folder: Path, data: bytes) -> None:
    """YAML of any kind: what `cmt` reads as plain data."""
    text = data.decode("utf-8", "replace")
    with guard.watched(folder):
        loading.parse_yaml(text, "text")
        scalars.value(text, "a.b")


def _manifest(folder: Path, data: bytes) -> None:
    """Even: the file as it is; odd: JSON that gets the checksum which makes it sound."""
    stage = folder / "stage"
    place = checkpoint.folder_of(stage, 1)
    place.mkdir(parents=True, exist_ok=True)
    (place / "ema-0.safetensors").write_bytes(seeds.SAFETENSORS)
    body = data[1:]
    if data[:1] and data[0] % 2 and isinstance(tree := _json(body), dict):
        tree.pop("xxh3_128", None)
        body = checkpoint.signed(tree).encode("utf-8", "replace")
    _written(place / "manifest.json", body)
    with guard.watched(folder):
        found = checkpoint.sized(place)
        checkpoint.ema_sum(found.manifest)
        for name in found.manifest["files"]:
            if name.endswith(".safetensors"):
                found.tensors(name.removesuffix(".safetensors"))


def _tensors(folder: Path, data: bytes) -> None:
    """Even: a file whose checksum is known; odd: its header is the case, with numbers behind it."""
    body = data[1:]
    if data[:1] and data[0] % 2:
        body = struct.pack("<Q", len(body)) + body + b"\0" * 64
    path = _written(folder / "case.safetensors", body)
    want = {"bytes": len(body), "xxh3_128": xxhash.xxh3_128_hexdigest(body)}
    with guard.watched(folder):
        reader = tensor_file.Reader(path, want)
        for name in reader.order:
            reader.fetch(name)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _header(folder: Path, data: bytes) -> None:
    """0: index.json as it is; 1: signed; 2: labels.npy, 3: checksums.npy, whose checksum the index has."""
    how, body = (data[0] % 4 if data else 0), data[1:]
    store, sound = folder / "store", seeds.store()
    store.mkdir(exist_ok=True)
    for name, content in sound.items():
        (store / name).write_bytes(content)
    tree = json.loads(sound["index.json"])
    if how == 1 and isinstance(given := _json(body), dict):
        tree = given
    if how > 1:
        name = ("labels.npy", "checksums.npy")[how - 2]
        (store / name).write_bytes(body)
        tree["files"][name] = xxhash.xxh3_128_hexdigest(body)
    tree.pop("xxh3_128", None)
    signed = {**tree, "xxh3_128": xxhash.xxh3_128_hexdigest(checkpoint.canonical(tree))}
    (store / "index.json").write_bytes(body if how == 0 else json.dumps(signed).encode())
    with guard.watched(folder):
        found = opened(store)
        found.verify()
        found.rows(torch.arange(min(2, found.n)))
        found.statistics()


def _archives(folder: Path, data: bytes) -> None:
    """0: the archive as it is; 1: a zip, 2: a deflated one, 3: a tar, of members that the case has."""
    how, body = (data[0] % 4 if data else 0), data[1:]
    made = (lambda b: b, zipped, lambda b: zipped(b, zipfile.ZIP_DEFLATED), tarred)[how](body)
    path = _written(folder / "case", made)
    for format in ("edm2", "edm", "npy"):
        with guard.watched(folder):
            try:
                found = importing._members(path, format)
                importing._layout(found, "pixels" if format == "edm" else "mean", "float32", False)
                found.part(0, min(found.n, 4))
            except DatasetError as error:
                last = error
            else:
                return
    raise last


def _safetensors_folder(folder: Path, data: bytes) -> None:
    """LightningDiT's shards. Even: a file as it is; odd: its header."""
    body = data[1:]
    if data[:1] and data[0] % 2:
        body = struct.pack("<Q", len(body)) + body + b"\0" * 256
    source = folder / "shards"
    source.mkdir(exist_ok=True)
    _written(source / "a.safetensors", body)
    with guard.watched(folder):
        found = importing._lightningdit(source, False)
        found.part(0, min(found.n, 2))


def _statistics(folder: Path, data: bytes) -> None:
    """0: .npz as it is; 1: .npz of members; 2: safetensors; 3: EDM2's pickle."""
    how, body = (data[0] % 4 if data else 0), data[1:]
    body = zipped(body) if how == 1 else body
    path = _written(folder / ("case" + (".npz", ".npz", ".safetensors", ".pkl")[how]), body)
    with guard.watched(folder):
        references.read(path, "fid", rows=True)


def _pickle(folder: Path, data: bytes) -> None:
    with guard.watched(folder):
        tensors, about = pickles.read(io.BytesIO(data), len(data))
        pickles.write(tensors, str(folder / sandbox.RESULTS[0]))
        json.dumps(about).encode()


def _import(folder: Path, data: bytes) -> None:
    """A checkpoint of others, as it is; what its family would make of it."""
    path = _written(folder / "case.pt", data)
    with guard.watched(folder):
        source = files.read(path)
        telling.find(source).asks(source)


def _weights(folder: Path, data: bytes) -> None:
    """Weights of a judge, and of the distance in features. 0: .pt; 1: safetensors."""
    how, body = (data[0] % 2 if data else 0), data[1:]
    path = _written(folder / ("case.pt", "case.safetensors")[how], body)
    with guard.watched(folder):
        distance._tensors("weights", str(path))
        weights.read(path, "a judge", "nowhere")


def _npz(folder: Path, data: bytes) -> None:
    """Even: images and labels in a .npz as it is; odd: of members."""
    body = zipped(data[1:]) if data[:1] and data[0] % 2 else data[1:]
    path = _written(folder / "case.npz", body)
    with guard.watched(folder):
        npz.load(Npz(str(path)))


def _labels(folder: Path, data: bytes) -> None:
    """A file of labels or counts. 0: .npz as it is; 1: of members; 2: .npy."""
    how, body = (data[0] % 3 if data else 0), data[1:]
    path = _written(folder / ("case.npy" if how == 2 else "case.npz"), zipped(body) if how == 1 else body)
    with guard.watched(folder):
        classes._file(path, 10)


def _images(folder: Path, data: bytes) -> None:
    with guard.watched(folder):
        grids.read(data, 1 << 16)


def in_process(path: Path, out: Path, seconds: int | None = None) -> dict[str, Any]:
    """`sandbox.read` without its process: the audit hook here sees all that its child would do."""
    data = path.read_bytes()
    if not data:
        raise Refused("it is empty")
    tensors, about = pickles.read(io.BytesIO(data), len(data))
    pickles.write(tensors, str(out / sandbox.RESULTS[0]))
    return json.loads(json.dumps(about))


TARGETS = {
    "archives": Target(_archives, (DatasetError,), seeds.archives),
    "config": Target(_config, (ConfigError,), seeds.configs, 1024),
    "header": Target(_header, (DatasetError,), seeds.headers),
    "images": Target(_images, (grids.BrokenImage,), seeds.images),
    "import": Target(_import, (ConfigError,), seeds.imports),
    "labels": Target(_labels, (ConfigError,), seeds.labels),
    "manifest": Target(_manifest, (checkpoint.CheckpointError,), seeds.manifests),
    "npz": Target(_npz, (ConfigError,), seeds.npzs),
    "pickle": Target(_pickle, (Refused,), seeds.pickled),
    "shards": Target(_safetensors_folder, (DatasetError,), seeds.shards),
    "statistics": Target(_statistics, (ConfigError,), seeds.statistics),
    "tensors": Target(_tensors, (checkpoint.CheckpointError,), seeds.tensors),
    "weights": Target(_weights, (ConfigError,), seeds.weights),
    "words": Target(_words, (ConfigError,), seeds.words, 512),
}
assert np.lib.format  # its readers are imported before the guard looks
