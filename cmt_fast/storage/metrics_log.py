"""Metrics as JSON lines, always; loggers beside them. What a person sees meanwhile is runtime/progress.py.

The file is only ever appended to. A stage that goes on from a checkpoint looks for the last row that the checkpoint vouches for
from the file's end, cuts the file there and reads nothing else, so a start costs what was lost and not what was done. Rows are
flat objects that any tool for JSON lines reads; the bill in them is what came onto it (bill_deltas.py). `rows` gives them back
whole, of this and of every earlier version; who wants curves and the newest figures reads record.py, in a few bytes a row.

Each row ends with a checksum of what stands before it in its line and of the stage whose folder it is in, so a row that was
damaged, or is of another stage, is left out, and not believed. A manifest says how many bytes of rows there were at its save.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from cmt_fast.storage import locks, sound
from cmt_fast.storage.bill_deltas import Reader, Writer
from cmt_fast.storage.heartbeat import beat
from cmt_fast.storage.loggers import Loggers, Opening

METRICS = "metrics.jsonl"
BLOCK = 1 << 16  # bytes that are read at once from the end
MARK = b',"xxh32":"'  # before a row's checksum
AFTER = 64  # rows that may follow those of a checkpoint and belong to its step
DIGITS = 4  # after the point, of what differs between equal runs anyway


def seeds(folder: Path) -> tuple[int, ...]:
    """Of the checksums of rows in a folder, the one that is written first: that of its stage, and of versions whose rows did not
    say it; in a folder that is no stage's, where a file was copied to be looked at, any."""
    named = sound.stage_of(folder.absolute())
    of = [xxhash.xxh32_intdigest(stage.encode()) for stage in ((named,) if named else sound.STAGES)]
    return (*of, 0) if named else (0, *of)


def sealed(row: str, seed: int = 0) -> str:
    """A row's text with the checksum of what stands before that. seed: the first of `seeds`."""
    return f'{row[:-1]}{MARK.decode()}{xxhash.xxh32_hexdigest(row[:-1].encode(), seed)}"}}'


def unsealed(line: bytes, of: Sequence[int] = (0,)) -> bytes | None:
    """A row's text without its checksum, as it is of a version that wrote none; None where it is not what was written. of: as
    `seeds` of its file's folder."""
    body, mark, seal = line.rstrip(b"\n").rpartition(MARK)
    if not mark:
        return seal
    known = any(seal[:8].decode("latin-1") == xxhash.xxh32_hexdigest(body, seed) for seed in of)
    return body + b"}" if known and seal[8:] == b'"}' else None


def parsed(line: bytes, of: Sequence[int] = (0,)) -> dict[str, Any] | None:
    """A row, None for what is none: what a kill tore, a disk that lost power, a bit that fell over, or a row of another stage.
    of: as `seeds`."""
    text = unsealed(line, of)
    try:
        row = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_row(row) else None


def _is_row(row: dict[str, Any]) -> bool:
    """Whether what it says is of the kinds that readers rely on, as far as it says it: rows of other versions say less."""
    counts = (row.get("step", 0), row.get("nimg", 0))
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in counts):
        return False
    if not isinstance(row.get("kind", ""), str) or not isinstance(wall := row.get("wall", {}), dict):
        return False
    if not all(_number(v) for v in (row.get("loss"), row.get("lr"), wall.get("train_s"), wall.get("eval_s"))):
        return False
    steps = row.get("steps", {}) if row.get("kind") == "eval" else {}
    if not isinstance(steps, dict) or ("wall" in row and list(row)[-1] != "wall"):
        return False  # what follows the last key was a checksum once
    return all(f is None or (isinstance(f, dict) and _number(f.get("frechet", 0))) for f in steps.values())


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def rows(path: Path, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file one by one, each with its bill. A line that is none is left out. end: in bytes."""
    try:
        opened = sound.handle(path)
    except (FileNotFoundError, NotADirectoryError, sound.Unsound):
        return
    bills, at, of = Reader(), 0, seeds(path.parent)
    with open(opened, "rb") as file:
        for line in file:
            at += len(line)
            if end is not None and at > end:
                return
            row = parsed(line, of)
            if row is None:
                bills.lost()
                continue
            if "wall" in row:
                row["wall"] = bills.whole(row["wall"])
            yield row


def wrong(path: Path) -> str:
    """Why a metrics file cannot be read at all; empty where it can, and where there is none."""
    try:
        os.close(sound.handle(path))
    except FileNotFoundError:
        return ""
    except (OSError, sound.Unsound) as error:
        return getattr(error, "why", None) or "cannot be read"
    return ""


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
        unseen: bool = False, manifest: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again. unseen: so
        does the evaluation of that very step, which its checkpoint came before.

        manifest: of the checkpoint that is gone on from; what it vouches for is as `commit` gave it.

        write: whether this process keeps it; another takes rows and leaves them. loggers: those that get what is logged too,
        of the stage that `about` describes.
        """
        self.file, self.run, self.bills, self.seed = None, folder.parent, Writer(), seeds(folder)[0]
        self.loggers, self.late = Loggers((), about or Opening("", folder)), Late()
        if write:
            path = folder / METRICS
            kept, seen = _cut(path, step, unseen)
            if missing := lacking(kept, manifest):
                print(f"{path}: {missing}", file=sys.stderr)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115  closed in close()
            self.late = Late(self.file, str(path), _absent(path, (manifest or {}).get("unwritten", ())))
            self.late.write()
            beat(self.run)
            if loggers and about:
                known = functools.partial(rows, path, kept)
                self.loggers = Loggers(loggers, about._replace(seen_nimg=seen), known)

    def row(self, kind: str, step: int, nimg: int, values: dict[str, Any], wall: dict[str, Any] | None = None) -> None:
        """Append one row. Where it cannot be written it waits in memory for the next row, or commit: no row is lost by that."""
        if self.file:
            beat(self.run)
            row = {"kind": kind, "step": step, "nimg": nimg, **values, "wall": self._short(wall or {})}
            self.late.add(sealed(json.dumps(row, separators=(",", ":")), self.seed) + "\n")
        self.loggers.row(kind, nimg, values, wall or {})

    def _short(self, wall: dict[str, Any]) -> dict[str, Any]:
        """In few bytes: seconds to a tenth of a thousandth, and of the bill what came onto it."""
        rest = {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in wall.items() if k != "bill"}
        return {**rest, **self.bills.short(wall["bill"])} if wall.get("bill") else rest

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """Give a picture that is on disk to the loggers."""
        self.loggers.picture(name, nimg, path)

    def commit(self) -> dict[str, Any]:
        """Force rows to disk, before a checkpoint that vouches for them. Returns what its manifest keeps: the bytes of those
        that are there, and, if any, those for which there is no room."""
        unwritten = self.late.sync()
        there = os.fstat(self.file.fileno()).st_size - self.late.taken if self.file else 0
        return {"metrics_bytes": there, **({"unwritten": unwritten} if unwritten else {})}

    def close(self) -> None:
        self.late.close()
        self.loggers.close()


class Late:
    """Lines on their way into a file. What it does not take waits, in order, from the byte on that it did not take; said once
    until it takes all again."""

    def __init__(self, file: Any = None, name: str = "", lines: Sequence[str] = ()) -> None:
        """file: unbuffered; None: it takes nothing, and nothing waits."""
        self.file, self.name, self._said = file, name, False
        self.lines = [line.encode() for line in lines]
        self.taken = 0  # bytes of the first of them that are in the file

    def add(self, line: str) -> None:
        self.lines.append(line.encode())
        self.write()

    def write(self) -> None:
        """What waits, as far as there is room, and the run's lease is this process's. Raises nothing: a record is worth less than
        what it is of, and who lost the lease ends at its next checkpoint."""
        try:
            if self.file and self.lines:
                locks.check(Path(self.name))
            while self.file and self.lines:
                self.taken += self.file.write(self.lines[0][self.taken :])
                if self.taken == len(self.lines[0]):
                    self.lines.pop(0)
                    self.taken = 0
            if self._said:
                print(f"cmt: {self.name}: can be written again, no row is lost", file=sys.stderr)
            self._said = False
        except OSError as error:
            self._tell(error)

    def sync(self) -> list[str]:
        """Write and fsync. Returns the lines that are not in the file, whole."""
        self.write()
        try:
            if self.file:
                os.fsync(self.file.fileno())
        except OSError as error:
            self._tell(error)
        return [line.decode() for line in self.lines]

    def close(self) -> None:
        """Try once more; what is left is said, and in the last checkpoint as far as that vouches for it."""
        self.write()
        if self.file:
            self.file.close()
        if self.lines:
            count = f"{len(self.lines):,} row{'s' * (len(self.lines) > 1)}"
            print(f"cmt: {self.name}: {count} could not be written; rerun the same command", file=sys.stderr)

    def _tell(self, error: OSError) -> None:
        if not self._said:
            print(f"cmt: {self.name}: {error.strerror}; rows wait in memory until it can be written", file=sys.stderr)
        self._said = True


def lacking(have: int, manifest: Mapping[str, Any] | None, key: str = "metrics_bytes") -> str:
    """What of the rows that a checkpoint vouches for is not in so many bytes of whole rows, a phrase; empty for nothing, and
    where it does not say. key: of the manifest."""
    want = (manifest or {}).get(key, 0)
    return f"{want - have:,} of {want:,} bytes of its rows are lost" if isinstance(want, int) and have < want else ""


def settle(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the rows that a checkpoint of a finished stage kept, if they are not in its file. Raises nothing."""
    if not manifest.get("unwritten"):
        return
    path = folder / METRICS
    with contextlib.suppress(OSError):
        _cut(path, manifest["step"], False)
        with open(path, "ab", buffering=0) as file:
            Late(file, str(path), _absent(path, manifest["unwritten"])).close()


def _absent(path: Path, lines: Sequence[str]) -> list[str]:
    """Those of the last rows of a file that are not in it, where a few of the same step may follow them, as of the look after
    a checkpoint."""
    if not lines or not path.is_file():
        return list(lines)
    with open(path, "rb") as file:
        found = itertools.islice(backwards(file), len(lines) + AFTER)
        have = {line + b"\n" for _, line in found}
    return [line for line in lines if line.encode() not in have]


def _cut(path: Path, step: int, unseen: bool) -> tuple[int, int]:
    """Drop what comes after the last row of at most `step` steps; unseen: and the evaluation of `step` itself.

    Lines that are no rows and may have stood for work that is not done again are kept in a file beside it, and named. What is
    no file, or cannot be read, is put aside. Returns the bytes that are left, and up to which image rows were there before.
    """
    try:
        opened = sound.handle(path, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    except (OSError, sound.Unsound) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        sound.aside(path, f"{getattr(error, 'why', None) or 'cannot be read'}: the rows before are lost")
        return 0, 0
    kept, seen, lost, of = 0, None, list[bytes](), seeds(path.parent)
    with open(opened, "r+b") as file:
        lost += tail(file)
        for end, line in backwards(file):
            row = parsed(line, of)
            if row is None:
                lost.append(line)
            if row is None or not {"step", "nimg"} <= row.keys():
                continue
            seen = row["nimg"] if seen is None else seen
            again = unseen and row["step"] == step and row.get("kind") in ("eval", "failed")
            if row["step"] <= step and not again:
                kept = end
                break
            lost.clear()  # of work that is done again
        if lost:
            _keep_lost(path, lost)
        file.truncate(kept)
    return kept, seen or 0


def tail(file: BinaryIO) -> list[bytes]:
    """What follows the last newline, if anything does: a row that a kill tore, or whose newline is another byte now."""
    at, rest = file.seek(0, os.SEEK_END), b""
    while at and b"\n" not in rest:
        size = min(BLOCK, at)
        at -= size
        file.seek(at)
        rest = file.read(size) + rest
    left = rest.rpartition(b"\n")[2]
    return [left] if left else []


def _keep_lost(path: Path, lines: list[bytes]) -> None:
    """Put lines that are no rows aside; the last one comes first."""
    place = path.with_name(f"{path.name}.damaged")
    print(f"{path}: {len(lines)} damaged row{'s' * (len(lines) > 1)}, put aside in {place.name}", file=sys.stderr)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with contextlib.suppress(OSError, sound.Unsound), open(sound.handle(place, flags), "ab") as file:
        file.write(b"\n".join([*reversed(lines), b""]))
