"""Metrics as JSON lines, always; loggers beside them. What a person sees meanwhile is runtime/progress.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmt_fast.storage import files
from cmt_fast.storage.heartbeat import beat
from cmt_fast.storage.loggers import Loggers, Opening

METRICS = "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file up to the first that is none: what a kill tore, or a disk that lost power, is left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


class Log:
    """One stage's record. Rows: {"kind", "step", "nimg", ..., "wall": {...}}; only "wall" differs between equal runs."""

    def __init__(
        self, folder: Path, step: int, write: bool, loggers: Sequence[str] = (), about: Opening | None = None
    ) -> None:
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again.

        write: whether this process keeps it; another takes rows and leaves them. loggers: those that get what is logged too,
        of the stage that `about` describes.
        """
        self.file, self.run = None, folder.parent
        self.loggers = Loggers((), about or Opening("", folder))
        if write:
            path = folder / METRICS
            rows = read(path)
            kept = [row for row in rows if row["step"] <= step]
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            beat(self.run)
            if loggers and about:
                seen = max((row["nimg"] for row in rows), default=0)
                self.loggers = Loggers(loggers, about._replace(seen_nimg=seen), kept)

    def row(self, kind: str, step: int, nimg: int, values: dict[str, Any], wall: dict[str, Any] | None = None) -> None:
        """Append one row and flush it to the system."""
        if self.file:
            beat(self.run)
            self.file.write(json.dumps({"kind": kind, "step": step, "nimg": nimg, **values, "wall": wall or {}}) + "\n")
            self.file.flush()
        self.loggers.row(kind, nimg, values, wall or {})

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
