"""What processes that died left half written in a run's folder: cleared away when the next one begins.

Everything is written under a name with `.tmp` in it and then renamed; where a file system renames no folder, a checkpoint has a
mark in it until its last file came. Who holds the run's lock is alone in writing checkpoints, snapshots, bills and run.json, so
what is left of those goes at once; other files are written by commands without the lock, and count as left when nobody has
touched them for a while. Damaged checkpoints that were put aside stay for `cmt runs rm`. Links are not followed, but for the
folders of a stage's checkpoints, which may be on a larger disk: there goes what is a checkpoint's alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from cmt_fast.storage import checkpoint, files, sound
from cmt_fast.storage.heartbeat import DEAD_S

LEFT = re.compile(r"\.tmp-(?P<of>.+?)(-\d+)?|(?P<early>.+)\.tmp-\d+")  # the second: what ends in .tmp-PID
CHECKPOINTS = "step-"
LOCKED = ("run.json", "bill.json", "manifest.json", CHECKPOINTS)  # how names of what is written under the lock begin
KEPT = "damaged-"
TAKEN = files.OLD.removeprefix(".tmp-")


def clear(run: Path) -> list[Path]:
    """Take them away, for who holds the run's lock; what cannot be removed stays. Returns what went."""
    gone, now = [], files.clock(run)
    linked = _linked(run)
    for folder in (run, *_folders(run), *linked):
        gone += _half_moved(folder)
        for path in _left(folder, CHECKPOINTS if folder in linked else ""):
            name = next(filter(None, LEFT.fullmatch(path.name).group("of", "early")))  # type: ignore[union-attr]
            with contextlib.suppress(OSError):
                if name.startswith(TAKEN):  # the only one, where a kill came between its two renames
                    files.restore(folder / path.name.removeprefix(files.OLD))
                    if not os.path.lexists(path):
                        continue
                    name = name.removeprefix(TAKEN)
                if name.startswith(KEPT) or not (name.startswith(LOCKED) or now - os.lstat(path).st_mtime > DEAD_S):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                gone.append(path)
    return gone


def _half_moved(folder: Path) -> list[Path]:
    """Take away the checkpoints of a folder whose files did not all come; whole ones lose their mark alone."""
    gone = []
    for mark in folder.glob(f"step-*/{files.MOVING}"):
        with contextlib.suppress(OSError):
            try:
                checkpoint.sized(mark.parent)
                mark.unlink()
            except checkpoint.CheckpointError:
                shutil.rmtree(mark.parent)
                gone.append(mark.parent)
    return gone


def _folders(run: Path) -> list[Path]:
    """Where a run's files are written."""
    depths = (
        "*",
        "*/checkpoints",
        "*/grids",
        "*/nonfinite",
        "*/snapshots/*/checkpoints",
        "judging/*",
        "*/checkpoints/step-*",
    )
    with contextlib.suppress(OSError):
        return [p for depth in depths for p in run.glob(depth) if p.is_dir() and not p.is_symlink()]
    return []


def _linked(run: Path) -> list[Path]:
    """The folders of checkpoints that are behind a link, of themselves or of their stage."""
    places = [run / name / "checkpoints" for name in sound.STAGES]
    return [p for p in places if (p.is_symlink() or p.parent.is_symlink()) and p.is_dir()]


def _left(folder: Path, of: str = "") -> list[Path]:
    """of: how the names begin of what is looked for, "" for all."""
    with contextlib.suppress(OSError):
        found = [name for name in os.listdir(folder) if LEFT.fullmatch(name)]
        return [folder / name for name in found if not of or name.startswith(f".tmp-{of}")]
    return []
