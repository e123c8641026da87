"""Where a command speaks: a stdout that is no UTF-8, that is closed, or that a full disk stands behind ends nothing.

Python raises for a "Fréchet" in ASCII, has no `sys.stdout` where the shell closed it, and gives the number of a closed stdout to
the next file that is opened, a checkpoint say, into which every print of a library then goes.

Lines of progress (`put`), and all that is printed while a stage trains (`unless_lost`), are left out where their file has no
room. What a command was asked to print is an error there as ever.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

# of a file that has no room, a terminal that was closed, a share that is away, a pipe whose reader is behind
LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.ESTALE, errno.EAGAIN)
PLAIN = "cmt-plain"  # how what an encoding lacks is written
SIGNS = {
    "–": "-", "—": "-", "−": "-", "━": "#", "─": "-", "×": "x", "·": ".", "…": "...", "’": "'", "“": '"', "”": '"', "±": "+-",
    "≤": "<=", "≥": ">=", "→": "->",
}  # fmt: skip


def ready() -> None:
    """Make stdin, stdout and stderr such that nobody who prints fails: open, and able to write every character somehow."""
    for number in (0, 1, 2):
        _open(number)
    codecs.register_error(PLAIN, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            how = "backslashreplace" if _unicode(stream.encoding) else PLAIN
            with contextlib.suppress(OSError):  # of a full disk, for one: it flushes
                if stream.errors != how:
                    stream.reconfigure(errors=how)


def put(text: str, stream: Any) -> None:
    """A line of progress. What cannot be written, as to a full disk or a terminal that was closed, is left out: it is told so
    that a person sees it, and training does not end for it. Raises BrokenPipeError where who read it is gone.
    """
    with _unless_lost(stream):
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def unless_lost() -> Iterator[None]:
    """Inside: what is printed is lost where its file has no room, and nothing ends for it."""
    with contextlib.redirect_stdout(_Tolerant(sys.stdout)), contextlib.redirect_stderr(_Tolerant(sys.stderr)):
        yield


class _Tolerant:
    """A text stream that takes what its file does not: all else is the stream's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _unless_lost(self._stream):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with _unless_lost(self._stream):
            self._stream.flush()


@contextlib.contextmanager
def _unless_lost(stream: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise
        _drain(stream)
    except ValueError:  # the stream was closed meanwhile
        if not getattr(stream, "closed", False):
            raise


def _drain(stream: Any) -> None:
    """Let go of what a stream still holds to be written, or the next flush fails as this one did."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError):  # no file of the system's
        return
    kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
        stream.flush()
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(nowhere)


def _open(number: int) -> None:
    """A handle that is closed leads nowhere from now on, so that no other file gets its number."""
    try:
        os.fstat(number)
    except OSError:
        other = os.open(os.devnull, os.O_RDWR)
        if other != number:
            os.dup2(other, number)
            os.close(other)


def _unicode(encoding: str | None) -> bool:
    return (encoding or "").lower().replace("-", "").replace("_", "").startswith("utf")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Letters without their accents, signs by what looks like them, everything else by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    out = []
    for c in error.object[error.start : error.end]:
        plain = SIGNS.get(c) or "".join(p for p in unicodedata.normalize("NFKD", c) if p.isascii())
        out.append(plain or c.encode("ascii", "backslashreplace").decode("ascii"))
    return "".join(out), error.end
