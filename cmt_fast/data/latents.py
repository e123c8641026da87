"""A store of latents (or 8-bit images) on disk: rows of a fixed stride in memory-mapped files.

    STORE/index.json      what the rows are: shape, dtype, statistics, autoencoder, crop, normalisation, shards, checksums
    STORE/shard-00000.bin rows, C order, little endian
    STORE/labels.npy      (n,) int64, where there are labels
    STORE/checksums.npy   (n,) uint64: xxh3_64 of each row, so a row is checked whenever it is read

A row of kind "mean+std" is a distribution: what is trained on is z = scale (mean + std eps - m) / s, with eps drawn for
each row in each epoch. The index is untrusted: its numbers must fit the files before anything is mapped.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from cmt_fast.config.schema.numbers import Count, Natural, schema
from cmt_fast.data.archives import DatasetError, array, parse
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.classes import Classes
from cmt_fast.diffusion import rng
from cmt_fast.storage import checkpoint
from cmt_fast.storage import files as files_

INDEX, LABELS, CHECKSUMS = "index.json", "labels.npy", "checksums.npy"
FORMAT = 1
INDEX_BYTES = 64 << 20
Side = Annotated[int, Field(ge=1, le=1 << 20)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Std = Annotated[float, Field(ge=1e-6, le=1e6)]


@schema
class Shard:
    """One file of rows."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5}\.(bin|tar)$")]
    rows: Count


@schema
class Rolled:
    """What the rows of a store of trajectories are, and all that they depend on (data/trajectories.py).

    shape: of one node; times: of the nodes; spread: nodes are stored times 1/sqrt(spread^2 + t^2), 0 as they are. The rest
    says which trajectories these are: `teacher` is of weights and architecture, `solver` of the table of coefficients;
    label_dropout: the share that was rolled out without a label, whose label is the number of classes; drawn: the classes that
    start labels are drawn from, () for all.
    """

    shape: Annotated[tuple[Side, ...], Field(min_length=1, max_length=3)]
    times: Annotated[tuple[float, ...], Field(min_length=2, max_length=100_000)]
    spread: Annotated[float, Field(ge=0, le=1e6)]
    path: str
    teacher: str
    solver: str
    solver_xxh3_128: str
    guidance: str
    precision: str
    seed: Natural
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    drawn: tuple[Natural, ...] = ()


@schema
class Index:
    """index.json. shape: of a stored row (C or 2 C, h, w); flips: the second half are the first half's mirror images.

    mean, std: of the latents over the data, channel by channel, before normalisation; files: xxh3_128 by name.
    trajectories: what they are where rows are those of a teacher, and no data. class_ids: the numbers that the source gave
    the classes, where those are not 0, 1, 2, ... without gaps.
    """

    format: Literal[1]
    kind: Literal["mean", "mean+std", "pixels"]
    dtype: Literal["float16", "float32", "uint8"]
    shape: tuple[Side, Side, Side]
    rows: Annotated[int, Field(ge=1, le=1 << 40)]
    flips: bool
    classes: Natural
    class_names: tuple[str, ...]
    mean: tuple[Mean, ...]
    std: tuple[Std, ...]
    vae: str
    vae_xxh3_128: str
    crop: str
    source: str
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    files: dict[Literal["labels.npy", "checksums.npy"], str]
    trajectories: Rolled | None = None
    class_ids: tuple[Natural, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of what is trained on."""
        return self.shape[0] // 2 if self.kind == "mean+std" else self.shape[0]

    @property
    def labels(self) -> int:
        """Labels are below this: the classes, and the null class where trajectories were rolled out without a label."""
        return self.classes + bool(self.trajectories and self.trajectories.label_dropout)

    @property
    def stride(self) -> int:
        """Bytes of a stored row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Statistics(NamedTuple):
    """Of all rows: mean and std (C,) of the latents, rows of each class, smallest and largest stored number."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: list[int]
    low: float
    high: float


class Read(Protocol):
    """How a small file of a store is read: its bytes, at most `most`. Raises DatasetError, with `absent` where there is none."""

    def __call__(self, path: Path, most: int, absent: str) -> bytes: ...


def small(path: Path, most: int, absent: str) -> bytes:
    """As Read, by this process."""
    if not path.is_file():
        raise DatasetError(f"{path.parent if path.name == INDEX else path}: {absent}")
    if path.stat().st_size > most:
        raise DatasetError(f"{path}: has {path.stat().st_size:,} bytes, that is too many")
    return path.read_bytes()


class Store:
    """Rows of a folder written by `cmt data encode` or `cmt data import`; as data.Stored. Raises DatasetError."""

    def __init__(
        self, folder: Path, flip: bool = False, normalisation: Normalisation | None = None, read: Read = small
    ) -> None:
        """flip: mirror images are rows too, those of the store or, of 8-bit images, made when read.

        normalisation: in place of the store's own, which brings each channel to mean 0 and standard deviation 0.5.
        read: of the small files; data/start.py has one by which a single rank reads them for all.
        """
        self.folder, self._read = folder, read
        self.index = index = read_index(folder, read)
        if sys.byteorder != "little":
            raise DatasetError(f"{folder}: stores are little endian, this machine is not")
        self.images = self._base = index.rows // 2 if index.flips else index.rows  # row i + images mirrors row i
        if flip and not index.flips and index.kind != "pixels":
            raise DatasetError(f"data.flip: {folder} holds no mirror images; encode or import them with --flip")
        self._mirror = flip and not index.flips
        self.n = self._base * (2 if flip else 1)
        self.shape: tuple[int, ...] = (index.channels, *index.shape[1:])
        self.classes, self.class_names, self.class_ids = index.classes, index.class_names, index.class_ids
        pixels = Normalisation((127.5,) * index.channels, (127.5,) * index.channels, 1.0)
        self.normalisation = normalisation or (
            pixels if index.kind == "pixels" else Normalisation(index.mean, index.std)
        )
        if {len(self.normalisation.mean), len(self.normalisation.std)} != {index.channels}:
            raise DatasetError(f"data.mean and data.std: need {index.channels} numbers each, one a channel of {folder}")
        self._checksums = self._numbers(CHECKSUMS, "<u8")
        labels = self._numbers(LABELS, "<i8") if index.classes else None
        if labels is not None and not (labels.min() >= 0 and labels.max() < index.labels):
            raise DatasetError(
                f"{folder / LABELS}: labels reach from {labels.min()} to {labels.max()}, not 0 to {index.labels - 1}"
            )
        self.stored_labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.labels = None if labels is None else self.stored_labels[torch.arange(self.n) % self._rows]
        self._starts = np.cumsum([0, *(s.rows for s in index.shards)])
        self._maps = [self._map(s) for s in index.shards]

    def __getstate__(self) -> dict[str, Any]:
        """To other processes goes where the rows are, not the rows."""
        return {**self.__dict__, "_maps": None, "_read": small}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = [self._map(s) for s in self.index.shards]

    @property
    def _rows(self) -> int:
        """Rows on disk that are in use, n or half of it."""
        return self._base if self._mirror else self.n

    def _map(self, shard: Shard) -> np.ndarray:
        path, wanted = self.folder / shard.file, shard.rows * self.index.stride
        size = path.stat().st_size if path.is_file() else -1
        if size != wanted:
            what = f"has {size:,} bytes, not {wanted:,}" if size >= 0 else "is missing"
            raise DatasetError(f"{path}: {what}")
        return mapped(path, wanted).reshape(shard.rows, self.index.stride)

    def _numbers(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        data = self._read(path, 8 * self.index.rows + 12_000, "is missing")
        if xxhash.xxh3_128_hexdigest(data) != self.index.files.get(name):
            raise DatasetError(f"{path}: is damaged, its checksum is another")
        found = array(data, str(path))
        if found.dtype != np.dtype(dtype) or found.shape != (self.index.rows,):
            raise DatasetError(f"{path}: holds {found.dtype} {found.shape}, not {dtype} ({self.index.rows},)")
        return found

    def relabel(self, own: Classes) -> None:
        """Take the network's numbers for the store's; rows on disk stay what they are."""
        self.labels, self.classes, self.class_names, self.class_ids = own.labels, own.classes, own.names, own.ids

    @functools.cached_property
    def facts(self) -> dict[str, int | str]:
        """As data.Rows: the index names every row's checksum through the file that holds them."""
        index = self._read(self.folder / INDEX, INDEX_BYTES, "is missing")
        return {"rows": self.n, "shards": len(self.index.shards), "xxh3_128": xxhash.xxh3_128_hexdigest(index)}

    def place(self, row: int) -> tuple[int, int]:
        """Shard and row in it of a stored row."""
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        return shard, row - int(self._starts[shard])

    def read(self, index: Tensor) -> Tensor:
        """index: (B,) int64 in [0, n), on the CPU -> (B, *stored shape) in the store's dtype.

        Raises DatasetError naming shard and row where bytes are not those that were written.
        """
        out = np.empty((len(index), self.index.stride), np.uint8)
        for k, row in enumerate((index % self._rows).tolist()):
            shard, i = self.place(row)
            out[k] = self._maps[shard][i]
            if xxhash.xxh3_64_intdigest(out[k]) != self._checksums[row]:
                raise DatasetError(
                    f"{self.folder / self.index.shards[shard].file}: row {i} (row {row} of the store) is damaged, "
                    "its checksum is another; `cmt data verify` lists all such rows"
                )
        return torch.from_numpy(out.view(self.index.dtype).reshape(-1, *self.index.shape))

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor:
        """What `read` gave, on any device -> z (B, *shape) float32. index, draw: (B,) there; draw None: eps = 0.

        eps of a row is a function of (seed, draw, row); it repeats after 2^32 rows drawn.
        """
        x = stored.float()
        if self.index.kind == "mean+std":
            x, std = x.chunk(2, 1)
            if draw is not None:
                x = x + std * rng.Random(seed, 0, 0).normal(rng.LATENT, draw * self.n + index, self.shape)
        if self._mirror:
            x = torch.where((index >= self._base).view(-1, 1, 1, 1), x.flip(-1), x)
        return self.normalisation.apply(x)

    def rows(self, index: Tensor, draw: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As data.Rows, on index's device."""
        stored = self.read(index.cpu()).to(index.device)
        labels = None if self.labels is None else self.labels[index.cpu()].to(index.device)
        return self.finish(stored, index, draw, seed), labels

    def read_alone(self) -> None:
        """From now on this process reads small files for itself."""
        self._read = small

    def damaged(self, shard: int, folder: Path | None = None) -> list[str]:
        """A line for each row of a shard that is not what its checksum says; folder: of a copy of the shard."""
        there = object.__new__(type(self))
        there.__dict__.update(self.__dict__, folder=folder or self.folder)
        name, first = self.index.shards[shard], int(self._starts[shard])
        return [
            f"{there.folder / name.file}: row {i} (row {first + i} of the store) is damaged"
            for i, row in enumerate(there._map(name))
            if xxhash.xxh3_64_intdigest(row) != self._checksums[first + i]
        ]

    def verify(self, tell=lambda rows: None) -> list[str]:
        """Every row against its checksum: one line for each damaged one, empty when all is sound. tell(rows done)."""
        bad = []
        for s, shard in enumerate(self.index.shards):
            bad += self.damaged(s)
            tell(shard.rows)
        return bad

    def statistics(self, tell=lambda rows: None) -> Statistics:
        """One pass over all stored rows. Raises DatasetError for numbers that are not finite."""
        sums, low, high = np.zeros((3, self.index.channels)), math.inf, -math.inf
        for shard, rows in zip(self.index.shards, self._maps):
            for start in range(0, len(rows), 64):
                part = (
                    np.ascontiguousarray(rows[start : start + 64]).view(self.index.dtype).reshape(-1, *self.index.shape)
                )
                if not np.isfinite(part).all():
                    raise DatasetError(f"{self.folder / shard.file}: has numbers that are not finite")
                sums += channel_sums(part, self.index.kind)
                low, high = min(low, float(part.min())), max(high, float(part.max()))
            tell(len(rows))
        counts = (
            [] if self.stored_labels is None else torch.bincount(self.stored_labels, minlength=self.classes).tolist()
        )
        return Statistics(*moments(sums), counts, low, high)


def channel_sums(stored: np.ndarray, kind: str) -> np.ndarray:
    """stored: (B, C or 2 C, h, w) -> (3, C) float64: numbers, their sum, sum of E[x^2], as the std is part of x."""
    x = stored.astype(np.float64)
    mean, std = np.split(x, 2, axis=1) if kind == "mean+std" else (x, None)
    square = np.square(mean) if std is None else np.square(mean) + np.square(std)
    count = np.full(mean.shape[1], mean.size // mean.shape[1], np.float64)
    return np.stack((count, mean.sum((0, 2, 3)), square.sum((0, 2, 3))))


def moments(sums: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(3, C) of `channel_sums` -> mean, std (C,)."""
    count, first, second = sums
    mean = first / count
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(second / count - mean**2, 0)).tolist())


def read_index(folder: Path, read: Read = small) -> Index:
    """The index of a store, its numbers checked against each other. Raises DatasetError."""
    path = folder / INDEX
    begun = " (encoding it has not ended)" if folder.with_name(folder.name + ".part").is_dir() else ""
    body = parse(read(path, INDEX_BYTES, f"is no store, it has no {INDEX}{begun}"), str(path))
    if not isinstance(body, dict) or body.pop("xxh3_128", "") != xxhash.xxh3_128_hexdigest(checkpoint.canonical(body)):
        raise DatasetError(f"{path}: is damaged, its checksum is another")
    try:
        index = TypeAdapter(Index).validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise DatasetError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    wrong = _contradiction(index)
    if wrong:
        raise DatasetError(f"{path}: {wrong}")
    return index


def _contradiction(index: Index) -> str:
    if (index.kind == "pixels") != (index.dtype == "uint8"):
        return f"kind {index.kind} does not go with dtype {index.dtype}"
    if index.kind == "mean+std" and index.shape[0] % 2:
        return f"shape {index.shape} has no mean and std in it"
    if sum(s.rows for s in index.shards) != index.rows or (index.flips and index.rows % 2):
        return f"rows: {index.rows} is not what the shards hold"
    if len({s.file for s in index.shards}) != len(index.shards):
        return "shards: a file appears twice"
    if {len(index.mean), len(index.std)} != {index.channels}:
        return f"mean, std: need {index.channels} numbers each"
    if index.class_names and len(index.class_names) != index.classes:
        return f"class_names: {len(index.class_names)} names for {index.classes} classes"
    if index.class_ids and (len(index.class_ids) != index.classes or len(set(index.class_ids)) != index.classes):
        return f"class_ids: {len(index.class_ids)} numbers for {index.classes} classes, or one of them twice"
    r = index.trajectories
    if r and (index.kind != "mean" or math.prod(index.shape) != len(r.times) * math.prod(r.shape)):
        return f"trajectories: {len(r.times)} nodes of {r.shape} are no rows of {index.shape}"
    return ""


def said(rolled: dict[str, Any]) -> dict[str, Any]:
    """A `Rolled` as plain data without keys that came later and say nothing: so checksums are those of before they came."""
    return {k: v for k, v in rolled.items() if v or k not in ("label_dropout", "drawn")}


def write_index(folder: Path, facts: dict[str, Any]) -> None:
    """index.json with its own checksum, whole or not at all. Raises DatasetError for facts that contradict each other."""
    index = TypeAdapter(Index).validate_python(facts)
    wrong = _contradiction(index)
    if wrong:
        raise DatasetError(f"{folder}: {wrong}")
    body = TypeAdapter(Index).dump_python(index, mode="json")
    for key, value in (("trajectories", None), ("class_ids", ())):
        if getattr(index, key) == value:
            del body[key]  # an index says what there is to say
    if index.trajectories is not None:
        body["trajectories"] = said(body["trajectories"])
    body["xxh3_128"] = xxhash.xxh3_128_hexdigest(checkpoint.canonical(body))
    files_.write_text(folder / INDEX, json.dumps(body, indent=1, sort_keys=True) + "\n")


def mapped(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes of a file, read when they are touched.

    Keeps no file open, as np.memmap does: ImageNet has more shards than a process may have open files, often 1,024.
    """
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
