"""Metrics as JSON lines, always; loggers beside them. What a person sees meanwhile is runtime/progress.py.

The file is only ever appended to. A stage that goes on from a checkpoint looks for the last row that the checkpoint vouches for
from the file's end, cuts the file there and reads nothing else, so a start costs what was lost and not what was done. Rows are
flat objects that any tool for JSON lines reads; the bill in them is what came onto it (bill_deltas.py). `rows` gives them back
whole, of this and of every earlier version; who wants curves and the newest figures reads record.py, in a few bytes a row.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cmt_fast.storage.bill_deltas import Reader, Writer
from cmt_fast.storage.heartbeat import beat
from cmt_fast.storage.loggers import Loggers, Opening

METRICS = "metrics.jsonl"
BLOCK = 1 << 16  # bytes that are read at once from the end
DIGITS = 4  # after the point, of what differs between equal runs anyway


def parsed(line: bytes) -> dict[str, Any] | None:
    """A row, None for what is none: what a kill tore, or a disk that lost power."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def rows(path: Path, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file one by one, each with its bill. A line that is none is left out. end: in bytes."""
    if not path.is_file():
        return
    bills, at = Reader(), 0
    with open(path, "rb") as file:
        for line in file:
            at += len(line)
            if end is not None and at > end:
                return
            row = parsed(line)
            if row is None:
                bills.lost()
                continue
            if "wall" in row:
                row["wall"] = bills.whole(row["wall"])
            yield row


def read(path: Path) -> list[dict[str, Any]]:
    """All of them; a file of 500,000 rows is a gigabyte so: `record.Record` holds what is asked of one in 12 MB."""
    return list(rows(path))


def backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it ends, line) of a file's whole lines, the last one first; what has no newline is left out."""
    at, rest, rest_ends = file.seek(0, os.SEEK_END), b"", 0  # rest: of a line that begins before `at`; 0: it has no end
    while at:
        size = min(BLOCK, at)
        at -= size
        file.seek(at)
        first, *lines = file.read(size).split(b"\n")
        if not lines:
            rest = first + rest
            continue
        if rest_ends:
            yield rest_ends, lines[-1] + rest
        end = at + size - len(lines[-1])
        for line in reversed(lines[:-1]):
            yield end, line
            end -= len(line) + 1
        rest, rest_ends = first, end
    if rest_ends:
        yield rest_ends, rest


class Log:
    """One stage's record. Rows: {"kind", "step", "nimg", ..., "wall": {...}}; only "wall" differs between equal runs."""

    def __init__(
        self, folder: Path, step: int, write: bool, loggers: Sequence[str] = (), about: Opening | None = None,
        unseen: bool = False,
    ) -> None:  # fmt: skip
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again. unseen: so
        does the evaluation of that very step, which its checkpoint came before.

        write: whether this process keeps it; another takes rows and leaves them. loggers: those that get what is logged too,
        of the stage that `about` describes.
        """
        self.file, self.run, self.bills = None, folder.parent, Writer()
        self.loggers = Loggers((), about or Opening("", folder))
        if write:
            path = folder / METRICS
            kept, seen = _cut(path, step, unseen)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            beat(self.run)
            if loggers and about:
                known = functools.partial(rows, path, kept)
                self.loggers = Loggers(loggers, about._replace(seen_nimg=seen), known)

    def row(self, kind: str, step: int, nimg: int, values: dict[str, Any], wall: dict[str, Any] | None = None) -> None:
        """Append one row and flush it to the system."""
        if self.file:
            beat(self.run)
            row = {"kind": kind, "step": step, "nimg": nimg, **values, "wall": self._short(wall or {})}
            self.file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self.file.flush()
        self.loggers.row(kind, nimg, values, wall or {})

    def _short(self, wall: dict[str, Any]) -> dict[str, Any]:
        """In few bytes: seconds to a tenth of a thousandth, and of the bill what came onto it."""
        rest = {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in wall.items() if k != "bill"}
        return {**rest, **self.bills.short(wall["bill"])} if wall.get("bill") else rest

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """Give a picture that is on disk to the loggers."""
        self.loggers.picture(name, nimg, path)

    def commit(self) -> None:
        """Force rows to disk, before a checkpoint that vouches for them."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.loggers.close()


def _cut(path: Path, step: int, unseen: bool) -> tuple[int, int]:
    """Drop what comes after the last row of at most `step` steps; unseen: and the evaluation of `step` itself.

    Returns the bytes that are left, and up to which image rows were there before.
    """
    if not path.is_file():
        return 0, 0
    kept, seen = 0, None
    with open(path, "r+b") as file:
        for end, line in backwards(file):
            row = parsed(line)
            if row is None or not {"step", "nimg"} <= row.keys():
                continue
            seen = row["nimg"] if seen is None else seen
            again = unseen and row["step"] == step and row.get("kind") in ("eval", "failed")
            if row["step"] <= step and not again:
                kept = end
                break
        file.truncate(kept)
    return kept, seen or 0
