"""Small files that are whole or not there, checksums of large ones, and what a file system may refuse.

Some refuse to sync a folder (CIFS, FUSE), to rename over a file that somebody reads (CIFS), or to rename a folder (object
stores): what is whole without it goes on, by the way round that is said at each function. No hard link is ever made. A full
disk is `DiskFull`, whoever wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT)  # no room, or none for this user
FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)
IN_USE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EEXIST, errno.ETXTBSY)
NO_RENAME = (errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)
PATIENCE_S = 1.0  # for who reads a file that is to be replaced, as a page is drawn
OLD = ".tmp-old-"  # before the name of a file that is being replaced where that takes two renames
MOVING = ".tmp-moving"  # in a folder whose files still come

_refuses: set[int] = set()  # devices that do not rename over a file, whoever waits


class DiskFull(OSError):
    """What is to be written does not fit. needed: bytes of all of it; free: bytes that may be written there."""

    def __init__(self, what: Path | str, needed: int, free: int, number: int = errno.ENOSPC) -> None:
        super().__init__(number, f"{os.strerror(number)}: it needs {needed:,} bytes and {free:,} are free", str(what))
        self.needed, self.free = needed, free


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room."""
    return isinstance(error, OSError) and error.errno in FULL


def free(folder: Path) -> int | None:
    """Bytes that may still be written where a folder is, or will be; None where the file system does not say."""
    above = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())
    try:
        total, _, left = shutil.disk_usage(above)
    except OSError:
        return None
    return left if total else None


def clock(folder: Path) -> float:
    """The time by the clock that sets the times of files in a folder, a server's perhaps; by ours where nothing may be
    written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or a folder where the file system does that: one that refuses has its own order of renames."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in FOLDER_SYNC or not path.is_dir():
            raise


def replace(source: Path, target: Path) -> None:
    """Rename a file over another one, or to a new name. Where that is refused while somebody has the other one open: again
    for PATIENCE_S, then the other one first takes a name from which `restore` brings it back after a kill."""
    end, device = time.monotonic() + PATIENCE_S, source.stat().st_dev
    while True:
        try:
            return os.replace(source, target)
        except OSError as error:
            if error.errno not in IN_USE or not target.is_file():
                raise
            if device in _refuses or time.monotonic() > end:
                break
        time.sleep(PATIENCE_S / 10)
    old = target.with_name(OLD + target.name)
    os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(old, target)
        raise
    _refuses.add(device)
    with contextlib.suppress(OSError):
        old.unlink()


def restore(target: Path) -> None:
    """Bring back a file that a kill inside `replace` left under its other name."""
    old = target.with_name(OLD + target.name)
    if old.exists() and not target.exists():
        os.replace(old, target)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Rename a folder to a new name; where folders are not renamed, its files one by one, the one named `last` as the last.
    Until then it holds a file MOVING."""
    try:
        return os.replace(source, target)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
    target.mkdir()
    try:
        (target / MOVING).touch()
        for file in sorted(source.iterdir(), key=lambda f: f.name == last):
            os.replace(file, target / file.name)
        sync(target)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    (target / MOVING).unlink()


def no_place(path: Path) -> bool:
    """Whether no file can be put in the place of what is there: a pipe, a device, a socket, or a link of the system's, as
    /dev/stdout. Nothing is opened."""
    if not os.path.lexists(path):
        return False
    kind = stat.S_IFMT(path.stat().st_mode) if os.path.exists(path) else stat.S_IFREG
    systems = path.is_symlink() and Path("/dev") in (path.parent.absolute(), path.parent.resolve())
    return systems or kind not in (stat.S_IFREG, stat.S_IFDIR)


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
    """A name beside `path` that is written inside and takes its place at the end; where that fails, nothing is left of it, and
    the error names `path`. A device, as /dev/null, is refused: root's rename would put a file in its place."""
    if not path.is_symlink() and (path.is_char_device() or path.is_block_device()):
        raise OSError(errno.EINVAL, "Is a device, not a file", str(path))
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with about(path):
            yield temporary
            replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, by rename, of what can be made again: nothing waits for the disk."""
    with by_rename(path) as temporary:
        temporary.write_bytes(data)


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
    with by_rename(path) as temporary:
        temporary.write_text(text, "utf-8")
        sync(temporary)
