"""Commands in processes that are slow where signals are to meet them, and are sent these."""

from __future__ import annotations

import contextlib
import mmap
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.safety import kills
from bench.safety.kills import LOOK, ROLL, SAVE, STEP
from cmt_fast import __main__ as command
from cmt_fast.config import loading
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.run.judging import Judging
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, signals
from cmt_fast.storage import checkpoint
from cmt_fast.teacher.rollouts import Rolling
from cmt_fast.train import loop
from cmt_fast.train.batches import BatchProvider
from cmt_fast.watch.state import Watched

INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
STOPS = (TERM, INT, USR1, HUP)
HELD_S = 1.0  # each batch, part of a rollout, save, of a process that is to be met there


class Case(NamedTuple):
    """what: the command; at: the moment, as `_held` knows it; numbers: signals, one after the other; ranks: processes; to: those
    ranks that get them."""

    what: str
    at: str
    numbers: tuple[int, ...]
    ranks: int = 1
    to: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        words = " then ".join(signal.Signals(n).name for n in self.numbers)
        ranks = "" if self.ranks == 1 else f", {'both' if len(self.to) > 1 else 'one'} of two ranks"
        return f"{self.what}, {self.at}{ranks}: {words}"


class Started(NamedTuple):
    """pids: of the ranks; seen: what each says it is at; log: of all."""

    pids: list[int]
    seen: list[mmap.mmap]
    log: Path
    case: Case
    terminal: int | None = None


def started(line: list[str], out: Path, case: Case, held: bool) -> Started:
    """The command in its processes; held: slow where the case's signals are to meet it."""
    log = out / "said.log"
    log.unlink(missing_ok=True)
    seen = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(case.ranks)]
    if case.what in ("import", "torchrun") and held:
        return Started([_spawned(case, line, log)], seen, log, case)
    terminal, child_end = pty.openpty() if "terminal" in case.at else (None, None)
    port, pids = _port(), []
    for rank in range(case.ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            if terminal is not None:
                os.close(terminal)  # whose last holder closes it
            _onto(log, child_end)
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
            for key, value in {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
                os.environ[key] = str(value)
            for kind in STOPS:
                signal.signal(kind, signal.SIG_DFL if kind != INT else signal.default_int_handler)
            if "nohup" in case.at:
                signal.signal(HUP, signal.SIG_IGN)
            kills._told(seen[rank])
            if held:
                _hold(case, seen[rank])
            sys.argv = ["cmt", *line]
            code = command.main() if held else _trained(line)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    if child_end is not None:
        os.close(child_end)
    return Started(pids, seen, log, case, terminal)


def _trained(line: list[str]) -> int:
    """What `cmt train` trains, without the page of the run: what a case is held against, and its end."""
    *overrides, _, stage, _, out = line[2:]
    distributed.start(torch.device("cpu"), kills.PATIENCE_S)
    loop.train(Workspace(loading.load("digits", overrides), Path(out)), [stage])
    distributed.stop()
    return 0


def _onto(log: Path, terminal: int | None) -> None:
    """Output to the log, or to a terminal that is this process's own."""
    if terminal is None:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        return
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for file in (0, 1, 2):
        os.dup2(terminal, file)
    signals._terminals = {1, 2}


def _spawned(case: Case, line: list[str], log: Path) -> int:
    """A process that imports everything itself; under torchrun where the case says so."""
    start = [sys.executable, "-m", "cmt_fast"]
    if case.what == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_port()),
                 "-m", "cmt_fast"]  # fmt: skip
        line = [*line, f"pre.images_nimg={1 << 20}"]
    with log.open("ab") as said:
        return subprocess.Popen([*start, *line], stdout=said, stderr=said).pid


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# what a case's moment is flagged by, and the method that is made slow there
PLACES: dict[str, tuple[int, Any, str]] = {
    "step": (STEP, BatchProvider, "draw"),
    "save": (SAVE, checkpoint, "_save"),
    "evaluation": (LOOK, Sampler, "draw_each"),
    "sampling": (LOOK, Sampler, "draw"),
    "rollouts": (ROLL, Rolling, "_roll"),
    "waiting": (LOOK, Watched, "look"),
}
READY = 8  # of the shared memory: the process is where its signals are to meet it


def _hold(case: Case, seen: mmap.mmap) -> None:
    """From now on this process is slow where the case is about, and says that it is there."""
    if case.at == "start":
        seen[READY] = 1
        return
    if "not return" in case.at or "finalizer" in case.at:
        signals.PATIENCE_S = 1.0
        _stuck(case, seen)
        return
    _, owner, name = PLACES[case.at.partition(",")[0]]
    real, calls, first = getattr(owner, name), [0], 6 if owner is BatchProvider else 2

    def slow(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] >= first:
            seen[READY] = 1
            end = time.monotonic() + HELD_S
            while time.monotonic() < end:  # a signal does not end it
                time.sleep(0.02)
        return real(*given, **more)

    setattr(owner, name, slow)


def _stuck(case: Case, seen: mmap.mmap) -> None:
    """An evaluation that is in a call of C for ever, or whose signal comes up in a finalizer."""
    import ctypes

    wait: Callable[[int], Any] = ctypes.CDLL(None).usleep
    real = Judging.figures

    class Left:
        def __del__(self) -> None:
            seen[READY] = 1
            end = time.monotonic() + 2.0
            while time.monotonic() < end:
                time.sleep(0.02)

    def figures(*given: Any, **more: Any) -> Any:
        if "finalizer" in case.at:
            Left()
            return real(*given, **more)
        seen[READY] = 1
        _in_c(wait, 60.0)
        return real(*given, **more)

    Judging.figures = figures  # type: ignore[method-assign]


def _in_c(wait: Callable[[int], Any], seconds: float) -> None:
    """Sleep in C without the interpreter's lock, as a collective call waits: signals do not end it early."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # another thread gets them
    wait(int(seconds * 1e6))


def sent(them: Started, case: Case) -> float:
    """Wait until the process is there, and send it its signals. The time of the first."""
    end = time.monotonic() + 60
    if case.what == "import":
        while time.monotonic() < end and not _catches(them.pids[0], TERM):
            time.sleep(0.001)  # the interpreter's own start is not ours
        time.sleep(0.3 * case.numbers[0] / TERM)  # at one import or another
    elif case.what == "torchrun":
        while time.monotonic() < end and not checkpoint.steps(them.log.parent / "run" / "pre"):
            time.sleep(0.05)
    else:
        while time.monotonic() < end and not all(them.seen[r][READY] for r in case.to):
            time.sleep(0.002)
        time.sleep(0.3 if case.at == "start" else 0.02)
    first = time.monotonic()
    for i, number in enumerate(case.numbers):
        if i:
            time.sleep(0.1)
        if them.terminal is not None:
            os.close(them.terminal)  # which sends it SIGHUP
            continue
        for rank in case.to:
            with contextlib.suppress(ProcessLookupError):
                os.kill(them.pids[rank], number)
    return first


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
        return bool(mask >> (number - 1) & 1)
    return False


def ended(them: Started, since: float | None = None) -> tuple[list[int], str]:
    """Exit codes by rank, 124 of one that had to be killed after 45 s (an undisturbed one: 120 s), and what was said."""
    end = (since or time.monotonic()) + (45 if since else 120)
    codes: dict[int, int] = {}
    while len(codes) < len(them.pids):
        for pid in them.pids:
            if pid not in codes:
                gone, status = os.waitpid(pid, os.WNOHANG)
                if gone:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = 124
        time.sleep(0.005)
    said = them.log.read_text("utf-8", "replace") if them.log.is_file() else ""
    return [codes[pid] for pid in them.pids], said
