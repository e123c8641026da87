"""Files that are there whole or not at all, and a disk that refuses them by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Inside: an OSError that names no file, as that of a write into a full disk, is of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def by_rename(path: Path) -> Iterator[Path]:
    """A name beside `path` that is written inside and takes its place at the end; where that fails, nothing is left of it."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with about(path):
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
