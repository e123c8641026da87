"""Metrics as JSON lines, always; progress as a rich bar on a terminal and plain lines elsewhere; loggers beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cmt_fast.storage.heartbeat import beat
from cmt_fast.storage.loggers import Loggers, Opening, picture_caption

METRICS = "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Log:
    """One stage's record. Rows: {"kind", "step", "nimg", ..., "wall": {...}}; only "wall" differs between equal runs."""

    def __init__(
        self, folder: Path, step: int, total: int, title: str, quiet: bool, loggers: tuple[str, ...] = (),
        about: Opening | None = None,
    ) -> None:  # fmt: skip
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again.

        loggers: those that get what is logged too, of the stage that `about` describes.
        """
        self.file, self.run = None, folder.parent
        self.total, self.title, self.quiet = total, title, quiet
        self.loggers, self.last = Loggers((), Opening("", folder)), step
        if not quiet:
            path = folder / METRICS
            rows = read(path)
            kept = [row for row in rows if row["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
            os.replace(temporary, path)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            beat(self.run)
            if loggers and about:
                seen = max((row["nimg"] for row in rows), default=0)
                self.loggers = Loggers(loggers, about._replace(seen_nimg=seen), kept)
        self.progress = None
        self.console = Console(stderr=False)
        if not quiet and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(title, total=total, completed=step, note="")
            self.progress.start()
        self._last_percent = -1

    def row(self, kind: str, step: int, nimg: int, values: dict[str, Any], wall: dict[str, Any] | None = None) -> None:
        """Append one row and flush it to the system."""
        if self.file:
            beat(self.run)
            self.file.write(json.dumps({"kind": kind, "step": step, "nimg": nimg, **values, "wall": wall or {}}) + "\n")
            self.file.flush()
        self.last = step
        self.loggers.row(kind, nimg, values, wall or {})

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """Give a picture that is on disk to the loggers."""
        self.loggers.picture(name, nimg, path, picture_caption(self.title, nimg))

    def commit(self) -> None:
        """Force rows to disk, before a checkpoint that vouches for them."""
        if self.file:
            os.fsync(self.file.fileno())

    def advance(self, step: int, note: str) -> None:
        """Show progress: the bar, or a plain line every ten percent."""
        if self.quiet:
            return
        if self.progress:
            self.progress.update(self.task, completed=step, note=note)
            return
        percent = 10 * (10 * step // self.total)
        if percent != self._last_percent:
            self._last_percent = percent
            print(f"{self.title:>8} {percent:3d} %  step {step}/{self.total}  {note}", flush=True)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        if self.file:
            self.file.close()
        self.loggers.close(whole=self.last >= self.total)
