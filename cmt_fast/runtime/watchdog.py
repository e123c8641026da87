"""What every rank knows of the others beside their collective calls: that they live, and where they are stuck.

A collective call waits for a rank that hangs, and under NCCL for one that is dead too, as long as its timeout says, and then says
nothing of why. So each rank has a thread that beats in the launcher's store. Where a call of this rank has waited for most of
the timeout, or for LOST_S seconds in which another rank has not beaten, the thread asks all for their stacks, writes this
rank's to RUN/stacks/rank-N.txt, says in one line whose came and whose did not, and ends the process with PEER_LOST, by which a
launcher starts all of them again. It does so before NCCL's own thread would abort the process.

A process that is aborted, or that breaks off, writes its stacks there as well.
"""

from __future__ import annotations

import contextlib
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
SHARE = 0.9  # of a call's timeout
STACKS, BEATS = "stacks", "heartbeats"  # folders of a run
BEAT_S = 10.0  # between a rank's files


class Watchdog:
    """One rank's. `waiting` is around its collective calls."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        """store: of the process group; the thread has a connection of its own, as one is busy while a call waits on it."""
        self.store, self.rank, self.size, self.timeout_s = store.clone(), rank, size, timeout_s
        self.every_s = min(EVERY_S, timeout_s / 20)
        self.since: float | None = None
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
        if self._file:
            faulthandler.disable()
            self._file.close()
            file = Path(self._file.name)
            with contextlib.suppress(OSError):  # there is nothing to say
                if not file.stat().st_size:
                    file.unlink()
                    file.parent.rmdir()

    def place(self, run: Path) -> None:
        """Where stacks go, and the beats of ranks."""
        self.folder = run
        with contextlib.suppress(OSError):
            (run / STACKS).mkdir(exist_ok=True)
            file = run / STACKS / f"rank-{self.rank}.txt"
            file.unlink(missing_ok=True)  # of a process before this one
            self._file = file.open("a", encoding="utf-8")
            faulthandler.enable(self._file)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside: the main thread may wait for another rank."""
        before, self.since = self.since, self.since or time.monotonic()
        try:
            yield
        finally:
            self.since = before

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
        n, heard = 0, dict[int, tuple[str, float]]()
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who had it: calls say so
            while not self._ended.wait(self.every_s):
                n += 1
                self.store.set(f"cmt/alive/{self.rank}", str(n))
                if self.store.check(["cmt/stuck"]):
                    return self._leave(int(self.store.get("cmt/stuck").decode()))
                since = self.since
                if since is None:
                    heard.clear()
                    continue
                waits = time.monotonic() - since
                if waits > SHARE * self.timeout_s:
                    return self.cry(f"a collective call has waited for {waits:.0f} s (timeout_s {self.timeout_s:g})")
                if waits > LOST_S / 2 and (silent := self._silent(heard)):
                    return self.cry(f"{_ranks(silent)} gave no sign of life for {LOST_S:.0f} s")

    def _silent(self, heard: dict[int, tuple[str, float]]) -> list[int]:
        """Ranks whose beat has not changed for LOST_S seconds of this wait."""
        now = time.monotonic()
        for rank in range(self.size):
            key = f"cmt/alive/{rank}"
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            if rank not in heard or heard[rank][0] != beat:
                heard[rank] = beat, now
        return [rank for rank, (_, at) in heard.items() if now - at > LOST_S]

    def cry(self, why: str) -> None:
        """Ask all ranks for their stacks, say so, and end this process."""
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

    def _leave(self, who: int) -> None:
        """Another rank has asked: where this one is, and its end, for all are started again."""
        self._dump()
        self.store.set(f"cmt/stacks/{self.rank}", "1")
        self._ended.wait(max(4 * self.every_s, 1.5))  # until who asked has told
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
