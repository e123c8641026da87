"""Take files out of a checkpoint so that it is whole at every moment, and count what a folder holds.

The new manifest names the files that stay and, as `pruned`, those that go. It takes the place of the old one by rename; only
then are files deleted. A kill before the rename leaves the old checkpoint, a kill after it the new one with files that nobody
reads, which the next call deletes. Nothing here follows a link.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cmt_fast.storage import checkpoint
from cmt_fast.storage.files import sync, write_text

MANIFEST = "manifest.json"


def walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file under a folder with what the system knows of it; links as themselves. What vanishes meanwhile is left out."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path))
            else:
                yield Path(entry.path), entry.stat(follow_symlinks=False)
        except OSError:
            continue


def size(folder: Path) -> int:
    """Bytes of the files under a folder, or of one file."""
    if folder.is_symlink() or not folder.is_dir():
        return folder.lstat().st_size if folder.is_symlink() or folder.exists() else 0
    return sum(stat.st_size for _, stat in walk(folder))


def spare(folder: Path, keep: Callable[[str], bool]) -> list[Path]:
    """The files of a checkpoint that `prune` would delete, those left behind by a kill too. Raises CheckpointError."""
    known = checkpoint.read_manifest(folder)
    listed = {**known.get("pruned", {}), **known["files"]}
    return [folder / n for n in listed if not (keep(n) and n in known["files"]) and os.path.lexists(folder / n)]


def prune(folder: Path, keep: Callable[[str], bool]) -> None:
    """Delete the files whose names `keep` refuses. Raises CheckpointError where the checkpoint is not whole."""
    manifest = checkpoint.verify(folder).manifest
    body = {k: v for k, v in manifest.items() if k != "xxh3_128"}
    going = {name: about for name, about in body["files"].items() if not keep(name)}
    if going:
        body["files"] = {name: about for name, about in body["files"].items() if name not in going}
        body["pruned"] = {**body.get("pruned", {}), **going}
        write_text(folder / MANIFEST, checkpoint.signed(body))
        sync(folder)
    for path in spare(folder, keep):
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file, a link itself, or a folder, which first takes a name that nobody reads: no half of it is ever found."""
    if path.is_symlink() or not path.is_dir():
        return path.unlink(missing_ok=True)
    path = path.resolve()  # `.` has no name
    hidden = path if path.name.startswith(".tmp-") else path.with_name(f".tmp-removed-{path.name}-{os.getpid()}")
    if hidden != path:
        os.replace(path, hidden)
    shutil.rmtree(hidden)
