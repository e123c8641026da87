"""A latent store as WebDataset shards: tar archives that any reader of WebDataset reads, rows of a fixed stride inside.

    OUT/index.json, labels.npy, checksums.npy   as of any store (data/latents.py), for the rows in their order here
    OUT/shard-00000.tar                         000000000.npy 000000000.cls 000000001.npy ...
    OUT/shard-00000.idx                         where each of them begins, in the form of DALI's wds2idx

The export puts the rows in a random order, so that each shard is a random part of the data, whatever order the classes
had. An epoch then takes the shards in one random order and the rows of each in another, all of a shard before the next:
a function of (seed, epoch), and at any time only one or two archives are read from.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash
from pydantic import TypeAdapter
from torch import Tensor

from cmt_fast.data.archives import DatasetError
from cmt_fast.data.latents import CHECKSUMS, LABELS, Index, Shard, Store, mapped, write_index
from cmt_fast.diffusion import rng
from cmt_fast.storage import files as files_

BLOCK = 512  # of a tar archive
RECORD = 10240  # an archive ends on a multiple of it
HEADER = 128  # bytes of every .npy header here


class Shards(Store):
    """Rows of a folder written by `cmt data shards`; as data.Stored, with an order of its own. Raises DatasetError."""

    @functools.cached_property
    def digits(self) -> int:
        """Bytes of a label: the class number in decimal digits, padded with zeros. 0 without labels."""
        return len(str(self.index.labels - 1)) if self.index.classes else 0

    @functools.cached_property
    def sample(self) -> int:
        """Bytes between a row and the next in an archive."""
        label = 2 * BLOCK if self.digits else 0
        return BLOCK + -(-(HEADER + self.index.stride) // BLOCK) * BLOCK + label

    def check(self) -> None:
        """Raises DatasetError naming the first archive that is not there or has not the bytes it had."""
        for shard in self.index.shards:
            self._map(shard)

    def archive(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / self.index.shards[shard].file

    def _map(self, shard: Shard) -> np.ndarray:
        path, used = self.folder / shard.file, shard.rows * self.sample
        wanted = -(-(used + 2 * BLOCK) // RECORD) * RECORD
        size = path.stat().st_size if path.is_file() else -1
        if size != wanted:
            what = f"has {size:,} bytes, not {wanted:,}" if size >= 0 else "is missing"
            raise DatasetError(f"{path}: {what}")
        rows = mapped(path, used).reshape(shard.rows, self.sample)
        if rows[0, BLOCK : BLOCK + HEADER].tobytes() != npy_header(self.index):
            raise DatasetError(f"{path}: its first row is no {self.index.dtype} array of the shape {self.index.shape}")
        return rows[:, BLOCK + HEADER : BLOCK + HEADER + self.index.stride]

    def shard_of(self, index: Tensor) -> Tensor:
        """The shard each row is in. index: (B,) int64 -> (B,)."""
        starts = torch.from_numpy(self._starts)
        return torch.searchsorted(starts, index % self._rows, right=True) - 1

    def order(self, random: rng.Random) -> Tensor:
        """The rows of one epoch, (n,) int64: shards at random, the rows of each at random, one shard after another."""
        shard = self.shard_of(torch.arange(self.n))
        place = torch.argsort(random.permutation(rng.SHARDS, len(self.index.shards)))[shard]
        within = random.permutation(rng.DATA, self.n)
        return within[torch.argsort(place[within], stable=True)]

    def index_file(self, index: Tensor, labels: bool = False) -> str:
        """The index file that makes DALI read the rows `index` (B,) of one archive, in this order.

        A line for each row: kind, offset, size and name of its array, and with `labels` of its label too.
        """
        row = index % self._rows
        begin = (row - torch.from_numpy(self._starts)[self.shard_of(index)]) * self.sample + BLOCK
        size, label, digits = HEADER + self.index.stride, self.sample - 2 * BLOCK, self.digits
        lines = [f"v1.2 {len(index)}"]
        for b, r in zip(begin.tolist(), row.tolist()):
            cls = f" cls {b + label} {digits} {r:09d}.cls" if labels and digits else ""
            lines.append(f"npy {b} {size} {r:09d}.npy{cls}")
        return "\n".join(lines) + "\n"

    def check_rows(self, index: Tensor, stored: np.ndarray) -> None:
        """Raises DatasetError unless `stored` (B, *stored shape) are the bytes of the rows `index` (B,)."""
        for row, numbers in zip((index % self._rows).tolist(), stored):
            if xxhash.xxh3_64_intdigest(numbers) != self._checksums[row]:
                self.read(torch.tensor([row]))  # the same error, if the archive has it
                raise DatasetError(f"{self.folder}: row {row} came as another, its checksum does not match")


def npy_header(index: Index) -> bytes:
    """The 128 bytes before the numbers of a .npy file of one row."""
    about = {"descr": np.dtype(index.dtype).newbyteorder("<").str, "fortran_order": False, "shape": tuple(index.shape)}
    text = str(about).encode().ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text


def export(store: Store, out: Path, per_shard: int, seed: int, tell: Callable[[int, int], None]) -> None:
    """Copy a store into shards of `per_shard` rows; tell(rows written, rows). Raises DatasetError for damaged rows.

    Everything is written to OUT.part, which gets its name at the end. Mirror images, where the store holds them, stay
    behind the others, in the same order.
    """
    index, part = store.index, out.with_name(out.name + ".part")
    if out.exists() or not out.parent.is_dir():
        raise DatasetError(f"{out}: {'exists' if out.exists() else 'its folder does not exist'}")
    if index.rows > per_shard * 99_999:
        raise DatasetError(f"--shard-rows: {per_shard} makes more than 99,999 shards of {index.rows:,} rows")
    base = index.rows // 2 if index.flips else index.rows
    order = rng.Random(seed, 0, 0).permutation(rng.EXPORT, base)
    order = torch.cat((order, order + base)) if index.flips else order
    if part.exists():
        raise DatasetError(f"{part}: exists; another store is being written to {out.name}, or was: remove it first")
    part.mkdir()
    labels = None if store.stored_labels is None else store.stored_labels[order].numpy()
    checksums, shards = np.empty(index.rows, "<u8"), []
    for i, rows in enumerate(order.split(per_shard)):
        first = i * per_shard
        mine = None if labels is None else labels[first : first + len(rows)]
        path = part / f"shard-{i:05d}.tar"
        checksums[first : first + len(rows)] = _write_shard(store, path, rows, mine, first)
        shards.append({"file": path.name, "rows": len(rows)})
        tell(first + len(rows), index.rows)
    files = {CHECKSUMS: _write_array(part / CHECKSUMS, checksums)}
    if labels is not None:
        files[LABELS] = _write_array(part / LABELS, labels.astype("<i8"))
    write_index(part, {**TypeAdapter(Index).dump_python(index, mode="json"), "shards": shards, "files": files})
    made = Shards(part, index.flips)
    for i, rows in enumerate(torch.arange(index.rows).split(per_shard)):
        files_.write_text(made.archive(i).with_suffix(".idx"), made.index_file(rows, labels=True))
    files_.sync(part)
    os.rename(part, out)
    files_.sync(out.parent)


def _write_shard(store: Store, path: Path, rows: Tensor, labels: np.ndarray | None, first: int) -> list[int]:
    """One archive of the store's rows (B,), named by their number from `first` on. Returns their checksums."""
    header, digits = npy_header(store.index), len(str(store.index.labels - 1))
    checksums = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:

        def add(name: str, content: bytes) -> None:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))

        for start in range(0, len(rows), 64):
            for i, row in enumerate(store.read(rows[start : start + 64]).numpy(), start):
                content = row.tobytes()
                checksums.append(xxhash.xxh3_64_intdigest(content))
                add(f"{first + i:09d}.npy", header + content)
                if labels is not None:
                    add(f"{first + i:09d}.cls", f"{labels[i]:0{digits}d}".encode())
    files_.sync(path)
    return checksums


def _write_array(path: Path, values: np.ndarray) -> str:
    np.save(path, values, allow_pickle=False)
    files_.sync(path)
    return files_.checksum(path)
