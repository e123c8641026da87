"""Whether a run is alive: the time of RUN/heartbeat."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

HEARTBEAT = "heartbeat"  # RUN/heartbeat: its time is when the run last did something

# seconds without a beat: what is usual, and from when on a run counts as dead
QUIET_S, DEAD_S = 120.0, 900.0


def beat(run: Path) -> None:
    """Say that the run is alive: the time of RUN/heartbeat is now. A folder that cannot be written is passed over."""
    if run.is_dir():
        with contextlib.suppress(OSError):
            (run / HEARTBEAT).touch()


def beat_above(path: Path) -> None:
    """The same for the run that a folder is in, if it is in one that has a heart."""
    for run in path.absolute().parents:
        if (run / HEARTBEAT).is_file():
            return beat(run)


def age(folder: Path, now: float | None = None) -> float | None:
    """Seconds since a run in `folder`, or in a folder of it, last was alive; None if none ever was. now: by the clock of its
    file system, as `files.clock` has it, which is another than ours where a server sets the times of files.

    A beat ahead of this clock, which was put back since or is another machine's, counts as old as it is ahead: a run that lives
    beats again by the new clock, and one that died must not pass for alive until the clock has caught up.
    """
    times = [f.stat().st_mtime for f in (folder / HEARTBEAT, *folder.glob(f"*/{HEARTBEAT}")) if f.is_file()]
    now = time.time() if now is None else now
    return min(abs(now - t) for t in times) if times else None
