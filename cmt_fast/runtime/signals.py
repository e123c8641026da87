"""Signals that ask a process to stop: noted, and answered where the work can be left."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """The process was asked to stop; a checkpoint is on disk. Exit code 128 + signal."""


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Inside: SIGTERM, SIGINT and SIGUSR1 are noted in the list instead of ending the process."""
    asked: list[int] = []
    before = {kind: signal.signal(kind, lambda number, _: asked.append(number)) for kind in KINDS}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
