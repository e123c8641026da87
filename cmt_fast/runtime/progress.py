"""Lines and bars for the person at the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cmt_fast.storage.heartbeat import beat


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


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stdout, flush=True)
