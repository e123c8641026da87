"""A stage's checkpoints, written while its steps go on.

A save copies this rank's part of the state to host memory; that copy is all that the steps wait for. One thread then gathers,
writes, hashes, syncs and renames, in the order in which saves were asked for. The next save waits for it, so do a stop, the
stage's end and the end of the process; what the disk refuses is raised on all ranks at the next look for a signal. Where the
host has no room for the copy, or the run says so (`saves: waiting`), the state is streamed to disk at once while the steps wait.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine import Engine, Snapshot, snapshot
from cmt_fast.engine.sharding import gb
from cmt_fast.runtime import distributed, memory, words
from cmt_fast.runtime.progress import say
from cmt_fast.storage import checkpoint, files, heartbeat

SHARE = 0.8  # of the host's free memory that a copy of the state may take
FULL = 2  # of the ways in which a save ends: done, refused, full
REFUSED = 1 << 16  # above any signal's number: a save has failed
AGAIN_S = 5.0  # between looks whether there is room
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_wait_s = 0.0  # for room on a full disk


@contextlib.contextmanager
def patience(given: str) -> Iterator[None]:
    """Inside, saves of this process wait so long for room: seconds, or a number with s, m, h or d. Raises ConfigError."""
    global _wait_s
    number, unit = (given[:-1], UNITS[given[-1]]) if given[-1:] in UNITS else (given, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"--disk-wait: {given!r} is no time; say seconds, or 90s, 10m, 2h, 1d; 0 does not wait")
    before, _wait_s = _wait_s, seconds
    try:
        yield
    finally:
        _wait_s = before


class Saver:
    """Saves of one engine. Every rank makes every call in the same order, except `asks`, `told` and `close`.

    write_s: seconds that this process has written in the background.
    """

    def __init__(self, engine: Engine, name: str, waiting: bool = False, asked: list[int] | None = None) -> None:
        """name: of the stage, for what is said; waiting: nothing is written in the background; asked: signals, none of which
        waits for room on a disk."""
        self.asked = [] if asked is None else asked
        self.engine, self.name, self.waiting = engine, name, waiting
        self.group = None if waiting else distributed.side_group()
        self.write_s, self._step, self._said = 0.0, -1, False
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[Future] = []
        self._copies: list[tuple[Future, Snapshot]] = []
        self._mark: Callable[[], None] | None = None

    def save(
        self, folder: Path, step: int, about: Mapping[str, Any], files: Mapping[str, str] | None = None, keep: int = 2
    ) -> None:
        """A checkpoint of the engine's present state, as `checkpoint.save`; files: of its state -> under which name, by
        default all as they are called.

        Raises OSError on all ranks where a disk refuses: this save if the steps wait for it, else one before.
        """
        if step != self._step:
            self.finish()
        self._step = step
        if self.waiting or not self._fits():
            self.finish()
            return self._until_there_is_room(
                lambda: self._put(self.engine.state(), folder, step, about, files, keep), folder, None
            )
        copy = self.engine.snapshot(files)
        job = self._thread.submit(self._write, copy, folder, step, dict(about), files, keep)
        self._pending.append(job)
        self._copies.append((job, copy))  # pinned memory is given back by this thread: the other may not touch CUDA

    def _write(
        self, copy: Snapshot, folder: Path, step: int, about: dict, files: Mapping[str, str] | None, keep: int
    ) -> None:
        """The thread's work, on every rank."""
        begun = time.perf_counter()
        put = lambda: self._put(copy.state(self.group), folder, step, about, files, keep)
        self._until_there_is_room(put, folder, self.group)
        self.write_s += time.perf_counter() - begun

    @staticmethod
    def _put(
        state: Mapping[str, Any], folder: Path, step: int, about: Mapping[str, Any], files: Mapping[str, str] | None,
        keep: int,
    ) -> None:  # fmt: skip
        named = {(files or {}).get(file, file): state[file] for file in (files or state)}
        checkpoint.save(folder, step, named, dict(about), keep=keep, write=distributed.rank() == 0)

    def _until_there_is_room(self, put: Callable[[], None], folder: Path, group: dist.ProcessGroup | None) -> None:
        """Call it, again while the disk is full and the time to wait is not over, on all ranks alike. Raises OSError on all:
        DiskFull where there was no room. group: of the collective calls, None for that of the training."""
        end, told, needed, free = time.monotonic() + _wait_s, False, 0, 0
        refused: Exception | None = None
        while True:
            if not told or self._may_fit(folder, needed, group):
                refused = None
                try:
                    put()
                except Exception as error:  # of any kind: the other ranks wait for this one's word
                    if distributed.lost(error):
                        raise
                    refused = error
                full = refused if isinstance(refused, files.DiskFull) else None
                mine = [FULL, full.needed, full.free] if full else [int(refused is not None), 0, 0]
                code, needed, free = _most(mine, group)
                if code == 0:
                    if told and distributed.rank() == 0:
                        say(f"{self.name:>8} there is room again: the checkpoint is written")
                    return
                if code != FULL:
                    raise refused or OSError(distributed.WRITER)
            if _most([int(bool(self.asked) or time.monotonic() >= end)], group)[0]:
                raise refused or files.DiskFull(folder, needed, free)
            if not told and distributed.rank() == 0:
                room = f"it needs {needed:,} bytes, {free:,} are free"
                how = f"tried again every {AGAIN_S:g} s for {words.duration(_wait_s)}"
                print(f"cmt: {self.name}: a checkpoint does not fit into {folder}: {room}; {how}", file=sys.stderr)
            told = True
            if distributed.rank() == 0:
                heartbeat.beat_above(folder)
            self._pause(end)

    @staticmethod
    def _may_fit(folder: Path, needed: int, group: dist.ProcessGroup | None) -> bool:
        """Whether the first rank's disk has room, as far as it says: else no state is gathered for nothing."""
        room = files.free(folder) if distributed.rank() == 0 else None
        return not _most([int(room is not None and room < needed)], group)[0]

    def _pause(self, end: float) -> None:
        """Until the next look; a signal ends it. A run that waits is alive."""
        until = min(end, time.monotonic() + AGAIN_S)
        while not self.asked and time.monotonic() < until:
            time.sleep(min(0.1, AGAIN_S / 10))

    def when_written(self, call: Callable[[], None]) -> None:
        """Call it, from `told` or `finish`, once all that was saved so far is on disk."""
        self._mark = call
        self.told()

    def told(self) -> None:
        """Make the call of `when_written` if it is due, and let go of what is written; waits for nothing."""
        self._copies = [(job, copy) for job, copy in self._copies if not job.done()]
        if self._mark and all(job.done() and not job.exception() for job in self._pending):
            call, self._mark = self._mark, None
            call()

    def asks(self, signal: int) -> int:
        """The signal, or REFUSED where a save has failed: then `finish`, on all ranks, says why."""
        return REFUSED if any(job.done() and job.exception() for job in self._pending) else signal

    def finish(self) -> None:
        """Wait until all is on disk. Raises OSError on all ranks where that refused."""
        if not self._pending:
            return
        errors = [job.exception() for job in self._pending]
        self._agree(next((error for error in errors if error), None))
        self.told()
        self._pending.clear()

    @staticmethod
    def _agree(refused: BaseException | None) -> None:
        """Raise it here, and OSError on all other ranks."""
        if refused and distributed.lost(refused):
            raise refused
        if distributed.largest(int(refused is not None)):
            raise refused or OSError(distributed.WRITER)

    def close(self) -> None:
        """Wait for what is being written, alone; an error that nobody will ask for any more is said."""
        self._thread.shutdown()  # once all is written
        for job in self._pending:
            error = job.exception()
            if error and error is not sys.exc_info()[1]:
                print(f"a checkpoint of {self.name} was not written: {error}", file=sys.stderr)
        self.told()

    def _fits(self) -> bool:
        """Whether every host has room for the copies of its ranks, the same on all; says so where it has not."""
        here = distributed.local_size()
        first = distributed.rank() - distributed.rank() % here
        mine = [float(self.engine.snapshot_bytes()), float(snapshot.kept_bytes())]
        needs, kept = zip(*distributed.every_rank(mine)[first : first + here])
        need, room = int(sum(needs)), memory.room() + int(sum(kept))
        fits = not distributed.largest(int(need > SHARE * room))
        if not fits and not self._said and distributed.rank() == 0:
            say(f"{self.name:>8} saves are waited for: a copy takes {gb(need)} of {gb(room)} of free host memory")
        self._said = self._said or not fits
        return fits


def _most(numbers: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """The largest of each of all ranks; group: as of `_until_there_is_room`."""
    if distributed.size() == 1:
        return numbers
    if group is None:
        return [distributed.largest(n) for n in numbers]
    x = torch.tensor(numbers)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x.tolist()
