"""A run on file systems that refuse calls, with every error number that says so, and the leases that stand for flock there."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import threading
import time
from pathlib import Path
from typing import Any

from bench.safety.small_disk import STAGE, Disk, state, trained

TAKERS = 8  # of a stale lease at once
REFUSALS = {
    "flock": (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL),
    "sync": (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES),
    "over": (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ETXTBSY),
    "folder": (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM),
    "link": (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK),
}
TITLES = {
    "flock": "flock", "sync": "fsync of a folder", "over": "rename over a file", "folder": "rename of a folder",
    "link": "hard links",
}  # fmt: skip


def refusals(disk: Disk, place: Path, arguments: argparse.Namespace, base: dict) -> list[dict[str, Any]]:
    """A run on a file system that refuses a call, which is stopped and goes on, and a second process that wants it."""
    from cmt_fast.storage import filesystem

    out = []
    for call, numbers in REFUSALS.items():
        row: dict[str, Any] = {"case": TITLES[call], "errors": [], "calls": 0, "faults": []}
        for number in numbers[: arguments.errors]:
            folder, before = place / f"{call}-{number}", disk.refused(call)
            disk.at(folder)
            disk.refuse(call, number)
            name = errno.errorcode[number]
            found = filesystem.probe(folder)
            if call != "link" and len(filesystem.lacks(found)) != 1:
                row["faults"].append(f"{name}: not seen by the probe ({filesystem.line(folder, found)})")
            with _second(folder, stop=4) as (seen, asked):
                first = trained(folder)
            if not isinstance(first, SystemExit) or not asked:
                row["faults"].append(f"{name}: was to stop, and ended by {first!r}")
            if seen != ["taken"]:
                row["faults"].append(f"{name}: a second process was not refused ({seen})")
            again = trained(folder)
            if again is not None or not _as(state(folder), base):
                row["faults"].append(f"{name}: ends otherwise ({again})")
            left = [p.name for p in folder.rglob(".*") if p.name not in (".lock",)]
            row["faults"] += [f"{name}: left {left}"] if left else []
            disk.refuse(call, 0)
            row["errors"].append(name)
            row["calls"] += disk.refused(call) - before
        out.append(row)
    return out


def _as(found: dict, base: dict) -> bool:
    """But for the checkpoint of the step at which it was stopped, which may be one of those that are kept."""
    return all(found[key] == base[key] for key in ("last", "snapshots", "rows"))


@contextlib.contextmanager
def _second(folder: Path, stop: int):
    """Inside, a run is asked for by another process at step `stop`, and then to stop."""
    from cmt_fast import engine
    from cmt_fast.storage import locks
    from cmt_fast.train import loop

    seen: list[str] = []
    asked: list[int] = []
    real, noted = engine.LocalEngine.step, loop.noted

    def step(local: Any, *given: Any) -> Any:
        if local.step_count + 1 == stop and not seen:
            try:
                with locks.holding(folder):
                    seen.append("had")
            except locks.Taken:
                seen.append("taken")
            asked.append(15)
        return real(local, *given)

    engine.LocalEngine.step = step  # type: ignore[method-assign]
    loop.noted = lambda: contextlib.nullcontext(asked)  # type: ignore[assignment]
    try:
        yield seen, asked
    finally:
        engine.LocalEngine.step, loop.noted = real, noted  # type: ignore[method-assign]


def leases(disk: Disk, place: Path) -> dict[str, Any]:
    """Leases that others left where flock is refused: of a dead process here, of one elsewhere that is quiet, or alive; TAKERS
    that want a stale one at once; and a holder that has lost its own."""
    from cmt_fast.storage import locks

    row: dict[str, Any] = {"case": "leases", "faults": []}
    locks.BEAT_S, locks.STALE_S = 0.05, 0.5
    disk.at(folder := place / "lease")
    disk.refuse("flock", errno.ENOLCK)

    def has(want: str, what: str, **other: Any) -> None:
        _leave(folder, **other)
        if (got := _got(folder)) != want:
            row["faults"].append(f"{what}: {got}, not {want}")

    began = time.monotonic()
    has("lease", "of a dead process of this machine", pid=1 << 30)
    row["dead_here_s"] = round(time.monotonic() - began, 3)
    has("lease", "of a quiet process elsewhere", host="elsewhere", boot="other")
    (folder / locks.LEASE).write_bytes(b"")
    if _got(folder) != "lease":
        row["faults"].append("a torn lease is not taken over")
    _leave(folder, host="elsewhere", boot="other")
    with _beating(folder / locks.LEASE):
        if _got(folder) != "taken":
            row["faults"].append("a lease of a live process elsewhere is taken over")
    _leave(folder, host="elsewhere", boot="other", token="old")
    won = _wanted(folder)
    if len(won) != TAKERS or won.count("lease") != 1:
        row["faults"].append(f"a stale lease was taken over by {won.count('lease')} of {len(won)} at once")
    held = locks.take(folder)
    _leave(folder, host="elsewhere", token="other")
    try:
        locks.check(folder / STAGE)
        row["faults"].append("a holder does not see that it lost its lease")
    except OSError:
        pass
    held.close()
    disk.refuse("flock", 0)
    return row


def _leave(folder: Path, **other: Any) -> None:
    """A lease of this process, but for these."""
    from cmt_fast.storage import locks

    (folder / locks.LEASE).write_text(locks._body({**locks._me(), **other}))


def _got(folder: Path, go: threading.Event | None = None, won: list[str] | None = None) -> str:
    """What who wants the folder gets: the kind of its lock, or "taken"; go: until when it keeps it."""
    from cmt_fast.storage import locks

    won = [] if won is None else won
    try:
        with locks.holding(folder) as held:
            won.append(held.kind)
            if go:
                go.wait(10)
            return held.kind
    except locks.Taken:
        won.append("taken")
        return "taken"


def _wanted(folder: Path) -> list[str]:
    """What each of TAKERS gets, who want it at once."""
    won: list[str] = []
    go = threading.Event()
    threads = [threading.Thread(target=_got, args=(folder, go, won)) for _ in range(TAKERS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    while len(won) < TAKERS and time.monotonic() < end:
        time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join()
    return won


@contextlib.contextmanager
def _beating(lease: Path):
    """Inside, another process's lease shows life."""
    ended = threading.Event()

    def beat() -> None:
        for n in itertools.count(1):
            if ended.wait(0.05):
                return
            with open(lease, "r+b") as file:
                file.write(f"{n:012}".encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
