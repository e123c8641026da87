"""Small files that are whole or not there, and checksums of large ones."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from torch import Tensor


def checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, by rename, of what can be made again: nothing waits for the disk."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """A safetensors file that those can read who may read the other files of its folder.

    safetensors 0.8 makes its files for their owner alone; here they get what the umask gives every new file. Raises OSError
    where it cannot be written, as for any other file; the library has an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # it brings torch, which small files do without

    path.open("wb").close()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, dict(about) if about else None)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(mode)


@contextlib.contextmanager
def unless_refused() -> Iterator[None]:
    """Inside: what is written is left out where nothing may be written, as on a disk that is mounted to be read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file whole, by rename."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    sync(temporary)
    os.replace(temporary, path)
