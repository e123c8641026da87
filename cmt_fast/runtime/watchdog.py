"""What every rank knows of the others beside their collective calls: that they live, and where they are stuck.

A collective call waits for a rank that hangs, and under NCCL for one that is dead too, as long as its timeout says, and then says
nothing of why. So each rank has a thread that beats in the launcher's store. Where a call of this rank has waited for most of
the timeout, or for LOST_S seconds in which another rank has not beaten, the thread asks all for their stacks, writes this
rank's to RUN/stacks/rank-N.txt, says in one line whose came and whose did not, and ends the process with PEER_LOST, by which a
launcher starts all of them again. It does so before NCCL's own thread would abort the process.

Seconds are counted by the thread as it lives through them: a process that a scheduler or a person had stopped, with all the
others, finds none missing when it goes on.

A process that is aborted, or that breaks off, writes its stacks there as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cmt_fast.runtime import exits, once

EVERY_S = 2.0  # between beats
LOST_S = 60.0  # without a beat, while others wait: the process is gone, its machine is, or it was stopped
NEXT = 4  # ranks that each looks after, as it waits
SHARE = 0.9  # of a call's timeout
STACKS, BEATS = "stacks", "heartbeats"  # folders of a run
BEFORE = "-before.txt"  # ends the name of stacks that an earlier process left
BEAT_S = 10.0  # between a rank's files


@dataclasses.dataclass
class _Wait:
    """What the thread knows of the call that the main thread is in: which, for how long, and each rank's last change of beat."""

    call: int = -1
    s: float = 0.0
    heard: dict[int, tuple[str, float]] = dataclasses.field(default_factory=dict)
    beats: int = 0


class Watchdog:
    """One rank's. `waiting` is around its collective calls."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        """store: of the process group; the thread has a connection of its own, as one is busy while a call waits on it."""
        self.store, self.rank, self.size, self.timeout_s = store.clone(), rank, size, timeout_s
        self.every_s = min(EVERY_S, timeout_s / 20)
        self._calls, self._inside, self._limited = (
            0,
            0,
            True,
        )  # of `waiting`: how many began, how deep it is in one, its kind
        self.folder: Path | None = None
        self._file: TextIO | None = None
        self._beaten = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()
        self._thread.join(self.every_s + 1.0)
        self._close()

    def place(self, run: Path) -> None:
        """Where stacks go, and the beats of ranks."""
        self._close()
        self.folder = run
        with contextlib.suppress(OSError):
            (run / STACKS).mkdir(exist_ok=True)
            file = run / STACKS / f"rank-{self.rank}.txt"
            if file.is_file() and file.stat().st_size:  # a launcher starts a group again before anyone has read them
                file.replace(file.with_name(f"rank-{self.rank}{BEFORE}"))
            self._file = file.open("w", encoding="utf-8")
            faulthandler.enable(self._file)

    def _close(self) -> None:
        """The file of stacks, which goes where nothing is in it."""
        opened, self._file = self._file, None
        if opened is None:
            return
        faulthandler.disable()
        opened.close()
        file = Path(opened.name)
        with contextlib.suppress(OSError):
            if not file.stat().st_size:
                file.unlink()
                file.parent.rmdir()

    @contextlib.contextmanager
    def waiting(self, limited: bool = True) -> Iterator[None]:
        """Inside: the main thread may wait for another rank. limited: not longer than the timeout; else as long as all live.
        One within another is a part of it."""
        if not self._inside:
            self._calls, self._limited = self._calls + 1, limited
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def beat(self, step: int) -> None:
        """This rank has done `step` steps of a stage: RUN/heartbeats/rank-N.json says so, at most every BEAT_S seconds."""
        now = time.monotonic()
        if self.folder is None or now - self._beaten < BEAT_S:
            return
        self._beaten = now
        about = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": time.time()}
        file = self.folder / BEATS / f"rank-{self.rank}.json"
        with contextlib.suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            scratch = file.with_suffix(".tmp")
            scratch.write_text(json.dumps(about), "utf-8")
            scratch.replace(file)

    # --------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        wait, last = _Wait(), time.monotonic()
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who had it: calls say so
            while not self._ended.wait(self.every_s):
                now = time.monotonic()
                lived, last = min(now - last, 2 * self.every_s), now  # of a longer gap this process knows nothing
                if self._tick(wait, lived):
                    return

    def _tick(self, wait: _Wait, lived: float) -> bool:
        """One beat, and a look at the others; lived: seconds since the last. Whether it was the last one."""
        wait.beats += 1
        self.store.set(f"cmt/alive/{self.rank}", str(wait.beats))
        if self.store.check(["cmt/stuck"]):
            who = int(self.store.get("cmt/stuck").decode())
            if who != self.rank:  # else the main thread has asked, and ends by itself
                self._leave()
            return True
        inside, call = self._inside, self._calls
        if not inside or call != wait.call:
            wait.call, wait.s = call, 0.0
            wait.heard.clear()
            return False
        wait.s += lived
        if self._limited and wait.s > SHARE * self.timeout_s:
            self.cry(f"a collective call has waited for {wait.s:.0f} s (timeout_s {self.timeout_s:g})")
            return True
        if wait.s > LOST_S / 2 and (silent := self._silent(wait.heard, wait.s)):
            self.cry(f"{_ranks(silent)} gave no sign of life for {LOST_S:.0f} s")
            return True
        return False

    def _silent(self, heard: dict[int, tuple[str, float]], now: float) -> list[int]:
        """Of the ranks after this one those whose beat has not changed for LOST_S seconds of this wait, `now` of which are over.

        Each looks after a few: of a thousand ranks that wait, all after all would be a million questions to one store.
        """
        for rank in ((self.rank + 1 + i) % self.size for i in range(min(NEXT, self.size - 1))):
            key = f"cmt/alive/{rank}"
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            if rank not in heard or heard[rank][0] != beat:
                heard[rank] = beat, now
        return [rank for rank, (_, at) in heard.items() if now - at > LOST_S]

    def cry(self, why: str) -> None:
        """Ask all ranks for their stacks, say so, and end this process. Where several would, one does."""
        if self.store.add("cmt/cries", 1) > 1:
            return self._leave()
        line, code = f"another process is dead or hangs: {why}; {self.ask()}", exits.DONE
        if once.tell():
            print(f"cmt: {once.named(line)}", file=sys.stderr, flush=True)
            once.leave(f"cmt: {once.named(line)}")
            code = exits.PEER_LOST
        os._exit(code)

    def ask(self) -> str:
        """Have all ranks that still can write their stacks; says whose came, and where they are. The others end by it."""
        came = [self.rank]
        with contextlib.suppress(RuntimeError):
            self.store.set("cmt/stuck", str(self.rank))
            self._dump()
            self.store.set(f"cmt/stacks/{self.rank}", "1")
            until = time.monotonic() + max(3 * self.every_s, 1.0)
            while time.monotonic() < until and len(came) < self.size:
                time.sleep(self.every_s / 4)
                came = [r for r in range(self.size) if r == self.rank or self.store.check([f"cmt/stacks/{r}"])]
        none = [r for r in range(self.size) if r not in came]
        where = self.folder / STACKS if self.folder else "stderr"
        return f"stacks of {_ranks(came)} in {where}" + (f", none came from {_ranks(none)}" if none else "")

    def _leave(self) -> None:
        """Another rank has asked: where this one is, and its end, for all are started again."""
        self._dump()
        self.store.set(f"cmt/stacks/{self.rank}", "1")
        self._ended.wait(max(4 * self.every_s, 1.5) + once.GRACE_S)  # until who asked has told
        os._exit(exits.DONE if once.told() else exits.PEER_LOST)

    def _dump(self) -> None:
        file = self._file or sys.stderr
        with contextlib.suppress(OSError, ValueError):
            print(f"rank {self.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def late(run: Path, limit_s: float = 3 * BEAT_S) -> list[str]:
    """Of a run's ranks, which beat at least `limit_s` before the last that did, a line each: who hangs, or died first."""
    found = []
    for file in sorted((run / BEATS).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if not file.is_file():  # a pipe would be waited for
                continue
            about = json.loads(file.read_text("utf-8"))
            found.append((float(about["time"]), f"rank {about['rank']} on {about['host']}, step {about['step']}"))
    last = max((at for at, _ in found), default=0.0)
    return [f"{who}: {last - at:.0f} s before the others" for at, who in found if last - at > limit_s]
