"""Lines for people on a disk that is full: a run whose output goes to a file there trains on without them."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any

LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


class Tolerant:
    """A text stream that takes what its file does not: all else is the stream's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _unless_lost():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with _unless_lost():
            self._stream.flush()


@contextlib.contextmanager
def _unless_lost() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise


@contextlib.contextmanager
def unless_full() -> Iterator[None]:
    """Inside: what is printed is lost where its file has no room, and nothing ends for it."""
    with contextlib.redirect_stdout(Tolerant(sys.stdout)), contextlib.redirect_stderr(Tolerant(sys.stderr)):
        yield
