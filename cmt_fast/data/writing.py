"""Writing a store: shard by shard into OUT.part, which becomes OUT when all is there.

A shard is written as .part, synced and renamed, then its record (labels, row checksums, sums) beside it. A shard whose
record has the same key is not made again, so the same command goes on after a kill and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from cmt_fast.data import classes, latents
from cmt_fast.data.archives import DatasetError
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import files as files_
from cmt_fast.storage import locks

BROKEN = "broken.tsv"
ROWS = 1024  # of a shard: 134 MB of 512-pixel latents in fp16, seconds of work on a GPU


class Layout(NamedTuple):
    """What a row is: kind, dtype and shape (C or 2 C, h, w) as in the index."""

    kind: str
    dtype: str
    shape: tuple[int, int, int]


class Writer:
    """One store under way. Raises DatasetError when OUT exists or another process writes it."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".part")

    def start(self) -> None:
        """Once, by the first process: OUT is free, OUT.part is there."""
        if self.out.exists():
            raise DatasetError(f"{self.out}: exists; a store is written to a new folder")
        if not self.out.parent.is_dir():
            raise DatasetError(f"{self.out}: its folder does not exist")
        self.folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process (group) at a time (storage/locks.py)."""
        with contextlib.ExitStack() as ending:
            try:
                ending.enter_context(locks.holding(self.folder, remove=True, tell=progress.say))
            except locks.Taken as taken:
                raise DatasetError(f"{self.out}: is being written by {taken.by}") from None
            yield

    @contextlib.contextmanager
    def lock_together(self) -> Iterator[None]:
        """The first process locks for all; all raise DatasetError when it cannot."""
        with contextlib.ExitStack() as held:
            lock = lambda: None if distributed.rank() else held.enter_context(self.lock())
            distributed.agreed(lock, DatasetError, f"{self.out}: is being written by another process")
            yield

    def abandon(self) -> None:
        """Remove what is half made."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def record(self, k: int, key: str) -> dict[str, Any] | None:
        """The record of shard k if it is there, whole and of this key."""
        try:
            found = json.loads(self._record(k).read_text("utf-8"))
            sound = found["key"] == key and self._shard(k).stat().st_size == found["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if sound else None

    def _shard(self, k: int) -> Path:
        return self.folder / f"shard-{k:05d}.bin"

    def _record(self, k: int) -> Path:
        return self.folder / f"shard-{k:05d}.json"

    @contextlib.contextmanager
    def shard(self, k: int, layout: Layout, key: str) -> Iterator[Rows]:
        """Rows added inside become shard k; an error leaves none."""
        part = self._shard(k).with_suffix(".part")
        self._record(k).unlink(missing_ok=True)
        with files_.about(part), open(part, "wb") as file:
            rows = Rows(file, layout, str(self.out))
            yield rows
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._shard(k))
        files_.sync(self.folder)
        record = {
            "key": key, "bytes": self._shard(k).stat().st_size, "labels": rows.labels, "notes": rows.notes,
            "checksums": [f"{c:016x}" for c in rows.checksums], "sums": rows.sums.tolist(),
        }  # fmt: skip
        files_.write_text(self._record(k), json.dumps(record))

    def finish(self, layout: Layout, keys: list[str], facts: dict[str, Any]) -> latents.Index:
        """Index, labels and checksums from the records of all shards, then OUT.part becomes OUT.

        facts: flips, class_names, vae, vae_xxh3_128, crop, source. Shards of no row are left out. What was left out of
        shards, and why, is in broken.tsv. Class numbers with gaps become 0, 1, 2, ..., and class_ids says what they were.
        """
        records = [self.record(k, key) for k, key in enumerate(keys)]
        assert all(r is not None for r in records)
        kept = [(k, r) for k, r in enumerate(records) if r and r["checksums"]]
        if not kept:
            raise DatasetError(f"{self.out}: not one row could be made")
        sums = np.sum([np.array(r["sums"]) for _, r in kept], axis=0)
        mean, std = latents.moments(sums)
        labels = [y for _, r in kept for y in r["labels"]]
        wrong = _constant(mean, std, len(labels), layout.kind) or _labels(labels, facts["flips"], self.folder)
        if wrong:
            raise DatasetError(f"{self.out}: {wrong}")
        names, ids = tuple(facts["class_names"]), ()
        has = labels[0] is not None
        if has and not names:  # a source that names its classes has a table of them, some may have no rows
            labels, ids = classes.dense(labels)
        arrays = {latents.CHECKSUMS: np.array([int(c, 16) for _, r in kept for c in r["checksums"]], "<u8")}
        if has:
            arrays[latents.LABELS] = np.array(labels, "<i8")
        files = {name: self._array(name, values) for name, values in arrays.items()}
        shards = []
        for number, (k, r) in enumerate(kept):
            if number != k:  # what came before had no rows
                os.replace(self._shard(k), self._shard(number))
            shards.append({"file": self._shard(number).name, "rows": len(r["checksums"])})
        latents.write_index(
            self.folder,
            {
                **facts, "format": latents.FORMAT, **layout._asdict(), "rows": len(labels),
                "classes": (len(names) or max(labels) + 1) if has else 0, "class_names": names if has else (),
                "class_ids": ids,
                "mean": mean, "std": std, "shards": shards, "files": files,
            },
        )  # fmt: skip
        notes = [f"{name}\t{reason}\n" for r in records if r for name, reason in r["notes"]]
        if notes:
            files_.write_text(self.folder / BROKEN, "".join(notes))
        known = {s["file"] for s in shards} | {latents.INDEX, *files, *([BROKEN] if notes else [])}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()
        files_.sync(self.folder)
        for name in (locks.LOCK, locks.LEASE):  # of a store that is whole nobody needs it
            (self.folder / name).unlink(missing_ok=True)
        os.rename(self.folder, self.out)
        files_.sync(self.out.parent)
        return latents.read_index(self.out)

    def _array(self, name: str, values: np.ndarray) -> str:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        path = self.folder / name
        path.write_bytes(buffer.getvalue())
        files_.sync(path)
        return xxhash.xxh3_128_hexdigest(buffer.getvalue())


def _constant(mean: tuple[float, ...], std: tuple[float, ...], n: int, kind: str) -> str:
    """What is wrong with channels of this mean and std over n rows, "" where they vary."""
    if min(std) >= 1e-6:
        return ""
    c = std.index(min(std))
    tip = "; --channels 1 makes grey images" if kind == "pixels" and max(std) >= 1 else ""
    where = f"{mean[c]:.4g} in {n:,} row{'s' * (n > 1)}"
    return f"channel {c} is the same number everywhere, {where}; there is nothing in it to learn{tip}"


def _labels(labels: list[int | None], flips: bool, folder: Path) -> str:
    """What is wrong with the labels of all rows, "" where nothing is."""
    if any(y is None for y in labels) and any(y is not None for y in labels):
        return "some rows have labels and some have none"
    half = len(labels) // 2
    if flips and (len(labels) % 2 or labels[:half] != labels[half:]):
        return f"the mirror images are not those of the images; the source has changed; remove {folder}"
    return ""


class Rows:
    """What one shard is given: rows in parts, each rounded to the store's dtype, checked and summed."""

    def __init__(self, file: Any, layout: Layout, out: str) -> None:
        self.file, self.layout, self.out = file, layout, out
        self.labels: list[int | None] = []
        self.checksums: list[int] = []
        self.notes: list[tuple[str, str]] = []  # what was left out, and why
        channels = layout.shape[0] // 2 if layout.kind == "mean+std" else layout.shape[0]
        self.sums = np.zeros((3, channels))

    def add(self, rows: np.ndarray, labels: list[int | None], where: str) -> None:
        """rows: (B, *shape) of any float dtype, or uint8. Raises DatasetError naming `where`, for what does not fit."""
        if rows.shape[1:] != self.layout.shape or (rows.dtype == np.uint8) != (self.layout.dtype == "uint8"):
            raise DatasetError(f"{where}: is {rows.dtype} {rows.shape[1:]}, the rows before it {self.layout.shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, np.dtype(self.layout.dtype).newbyteorder("<"))
        if not np.isfinite(stored).all():
            raise DatasetError(f"{where}: has numbers that {self.layout.dtype} cannot hold")
        if self.layout.kind == "mean+std" and (stored[:, self.layout.shape[0] // 2 :] < 0).any():
            raise DatasetError(f"{where}: has a negative standard deviation")
        for row, label in zip(stored, labels, strict=True):
            data = row.tobytes()
            self.file.write(data)
            self.checksums.append(xxhash.xxh3_64_intdigest(data))
            self.labels.append(label)
        self.sums += latents.channel_sums(stored, self.layout.kind)


def key_of(*facts: Any) -> str:
    """What a shard was made of, as a checksum."""
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
