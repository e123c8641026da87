"""What the file system of a folder does and refuses, tried out in it at the start of a run, for one line."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cmt_fast.storage import files, tensor_file

MOUNTS = Path("/proc/self/mountinfo")
LATE_S = 1.0  # from here on another clock, or the ticks of file times, count


class Abilities(NamedTuple):
    """kind: as mounted; the next four: whether it does; tick_s: of file times; late_s: how far they are behind our clock."""

    kind: str
    flock: bool
    folder_sync: bool
    replaces_open: bool
    renames_folders: bool
    tick_s: float
    late_s: float


def probe(folder: Path) -> Abilities:
    """Try it, in a folder of its own that is gone afterwards. Raises OSError where nothing can be written."""
    with files.about(folder):
        return _probed(folder, Path(tempfile.mkdtemp(prefix=".tmp-probe-", dir=folder)))


def _probed(folder: Path, place: Path) -> Abilities:
    """The same, in a folder that goes."""
    try:
        began, one, two = time.time(), place / "one", place / "two"
        one.write_bytes(b"1")
        two.write_bytes(b"2")
        ended, times = time.time(), [f.stat().st_mtime_ns for f in (one, two, place)]
        at = times[0] / 1e9  # a slow disk is not a late clock: what is between the two is not told
        late = max(began - at, 0.0) + min(ended - at, 0.0)
        with open(two, "rb") as file:
            flock = _does(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
            replaces = _does(lambda: os.replace(one, two))
        (place / "folder").mkdir()
        (place / "folder" / "file").touch()
        renames = _does(lambda: os.replace(place / "folder", place / "renamed"))
        tick = next((s for s in (2.0, 1.0) if not any(t % int(s * 1e9) for t in times)), 0.0)
        return Abilities(kind(folder), flock, _does(lambda: _sync(place)), replaces, renames, tick, late)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _does(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        if files.is_full(error):
            raise
        return False
    return True


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def kind(folder: Path) -> str:
    """As /proc says it is mounted, empty where it does not."""
    real, best = os.path.realpath(folder), ("", "")
    with contextlib.suppress(OSError, IndexError):
        for line in MOUNTS.read_text("utf-8", "replace").splitlines():
            before, _, after = line.partition(" - ")
            point = before.split()[4].replace("\\040", " ")
            if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
                best = point, after.split()[0]
    return best[1]


def lacks(found: Abilities) -> list[str]:
    """What it refuses, with what is done instead; empty where it does all."""
    out = []
    if not found.flock:
        out.append("no flock: a lease with host, pid and heartbeat is the lock")
    if not found.folder_sync:
        out.append("no fsync of folders: what a power cut takes is up to it")
    if not found.replaces_open:
        out.append("no rename over an open file: in two steps")
    if not found.renames_folders:
        out.append("no rename of folders: checkpoints are moved file by file, the manifest last")
    if found.tick_s or abs(found.late_s) > LATE_S:
        behind = f", {found.late_s:+.0f} s from this clock" if abs(found.late_s) > LATE_S else ""
        out.append(f"file times in steps of {max(found.tick_s, 1e-3):g} s{behind}: checksums are remembered later")
    return out


def adapt(found: Abilities) -> None:
    """A file that changed within a tick of its clock is hashed again: of a coarse or late clock that is longer."""
    tensor_file.racy(math.ceil(1e9 * (2 * found.tick_s + max(0.0, found.late_s))))


def line(folder: Path, found: Abilities) -> str:
    """For the start of a run."""
    said = "; ".join(lacks(found)) or "flock, fsync of folders, rename over open files"
    return f"disk: {folder} is {found.kind or 'of an unknown kind'}: {said}"
