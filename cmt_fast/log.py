"""Metrics as JSON lines, always; progress as a rich bar on a terminal and plain lines elsewhere; TensorBoard as an extra."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"
HEARTBEAT = "heartbeat"  # RUN/heartbeat: its time is when the run last did something


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

    def __init__(self, folder: Path, step: int, total: int, title: str, quiet: bool, tensorboard: bool = False) -> None:
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again."""
        self.file, self.run = None, folder.parent
        self.total, self.title, self.quiet = total, title, quiet
        self.board = None
        if not quiet:
            path = folder / METRICS
            kept = [row for row in read(path) if row["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
            os.replace(temporary, path)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            beat(self.run)
            if tensorboard:
                self.board = _tensorboard(folder)
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
        if self.board:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{key}", value, nimg)

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
        if self.board:
            self.board.close()


def beat(run: Path) -> None:
    """Say that the run is alive: the time of RUN/heartbeat is now. A folder that cannot be written is passed over."""
    if run.is_dir():
        with contextlib.suppress(OSError):
            (run / HEARTBEAT).touch()


def heartbeat(folder: Path) -> float | None:
    """Seconds since a run in `folder`, or in a folder of it, last was alive; None if none ever was."""
    times = [f.stat().st_mtime for f in (folder / HEARTBEAT, *folder.glob(f"*/{HEARTBEAT}")) if f.is_file()]
    return max(0.0, time.time() - max(times)) if times else None


@contextlib.contextmanager
def counting(title: str, total: int, run: Path | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Inside: the function to call with how many more are done; a bar on stderr, or a line there every half minute.

    Beats the run's heart, if it is of a run. Prints nothing where `quiet`, and on ranks other than the first.
    """
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    shown = not quiet and console.is_terminal
    task, done, said = bar.add_task(title, total=total), 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if run and os.environ.get("RANK", "0") == "0":
            beat(run)
        bar.advance(task, more)
        if not quiet and not shown and time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{title:>8} {done}/{total}", file=sys.stderr, flush=True)

    if shown:
        bar.start()
    try:
        yield advance
    finally:
        if shown:
            bar.stop()


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: is true, but the package is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stdout, flush=True)
