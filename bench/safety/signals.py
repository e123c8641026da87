"""Signals to every kind of command, at every kind of moment: exit code, seconds to the end, what is said, what is on disk.

A case is a command in a process of its own, most forked from this one with their imports done, that is sent one signal or
more when it is where the case wants it, and is made slow there (it sleeps between batches), so that who does not look between
batches is late. Training has to end within 20 s with a checkpoint of the last step that it had taken; the same command then
goes on and ends with the bits of a run that nobody disturbed. What is no training ends with 128 + signal and one line. A
traceback fails every case. All 56 take about 2 minutes of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from safetensors.torch import save_file

from bench.harness import results_file
from bench.safety import kills
from bench.safety.kills import LOOK, ROLL, SAVE, STEP
from cmt_fast import __main__ as command
from cmt_fast.config import loading
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.evaluation.features import Classifier
from cmt_fast.run.judging import Judging
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, exits, signals
from cmt_fast.storage import checkpoint
from cmt_fast.teacher.rollouts import Rolling
from cmt_fast.train import loop
from cmt_fast.train.batches import BatchProvider

TARGET = results_file.ROOT / "bench" / "results" / "cpu" / "signals.json"
WITHIN_S = 20.0  # from the signal to the end
HELD_S = 1.0  # each batch, part of a rollout, save, of a process that is to be met there
INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
# 30 batches of an evaluation, and as many parts of a round
MORE = ["eval.batch=1", "eval.n=30", "eval.n_during=30", "mid.trajectories.rollout_batch=1"]
MORE += [f"{stage}.images_nimg={16 * kills.BATCH}" for stage in ("pre", "mid")]


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
        sent = " then ".join(signal.Signals(n).name for n in self.numbers)
        ranks = "" if self.ranks == 1 else f", {'both' if len(self.to) > 1 else 'one'} of two ranks"
        return f"{self.what}, {self.at}{ranks}: {sent}"


STOPS = (TERM, INT, USR1, HUP)
TRAINING = [Case("train", at, (n,)) for at in ("start", "step", "save", "evaluation", "rollouts") for n in STOPS]
TWICE = [
    Case("train", at, pair)
    for at, pair in (
        ("step", (INT, INT)), ("step", (INT, TERM)), ("save", (TERM, TERM)), ("evaluation", (HUP, TERM)),
        ("rollouts", (USR1, INT)), ("evaluation", (INT, INT, INT, TERM)),
    )
]  # fmt: skip
OTHERS = [
    Case(what, at, (n,))
    for what, at in (("import", "start"), ("eval", "evaluation"), ("report", "evaluation"), ("sample", "sampling"),
                     ("trajectories", "rollouts"), ("watch", "waiting"))
    for n in (INT, TERM, HUP)
]  # fmt: skip
AT_ONCE = [Case("eval", "a call that does not return", (INT, INT)), Case("eval", "a call that does not return", (TERM,)),
           Case("eval", "a finalizer", (INT,))]  # fmt: skip
RANKS = [Case("train", "step", (TERM,), 2, (1,)), Case("train", "evaluation", (INT,), 2, (1,)),
         Case("train", "rollouts", (USR1,), 2, (0,)), Case("sample", "sampling", (TERM,), 2, (1,)),
         Case("train", "step", (TERM,), 2, (0, 1)), Case("train", "evaluation", (INT, TERM), 2, (0, 1))]  # fmt: skip
AROUND = [Case("train", "step, its terminal closed", (HUP,)), Case("train", "step, by nohup", (HUP,)),
          Case("torchrun", "step", (TERM,), 2)]  # fmt: skip
CASES = [*TRAINING, *TWICE, *OTHERS, *AT_ONCE, *RANKS, *AROUND]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--n", type=int, default=len(CASES), help=f"cases, drawn by the seed (default: all {len(CASES)})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", help="cases whose names have it")
    parser.add_argument("--out", type=Path, default=TARGET, help="the JSON file of the results")


def run(arguments: argparse.Namespace) -> int:
    """A line a case. 1 where one does not end as it should."""
    torch.set_num_threads(1)
    import sklearn.datasets  # noqa: F401  before the forks

    chosen = [c for c in CASES if not arguments.only or arguments.only in c.name]
    if arguments.n < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.n)
    began, rows = os.times(), []
    with tempfile.TemporaryDirectory(prefix="signals-") as place:
        world = World(Path(place), {2} & {c.ranks for c in chosen})
        for i, case in enumerate(chosen):
            rows.append(world.lived(case, i))
            wrong = "; ".join(rows[-1]["wrong"])
            print(
                f"{case.name}: {rows[-1]['codes']} after {rows[-1]['s']:.1f} s{f'  WRONG: {wrong}' if wrong else ''}",
                flush=True,
            )
    spent = sum(b - a for a, b in zip(began[:4], os.times()[:4]))
    wrong_ = [row for row in rows if row["wrong"]]
    training = [row["s"] for row in rows if row["what"] == "train" and "nohup" not in row["case"]]
    data = {**results_file.about("cpu"), "cases": len(rows), "wrong": len(wrong_), "rows": rows, "cpu_s": round(spent)}
    data |= {"slowest_s": max(training, default=0.0), "within_s": WITHIN_S}
    results_file.write_json(arguments.out, data)
    print(f"{len(rows)} cases, {len(wrong_)} wrong; at most {data['slowest_s']:.1f} s to the end; {spent:.0f} CPU s")
    return int(bool(wrong_))


# ------------------------------------------------------------------------------------------------ the world of a case


class World:
    """Undisturbed runs by number of ranks, beside which cases are lived."""

    def __init__(self, folder: Path, more: set[int]) -> None:
        self.folder = folder
        for ranks in (1, *more):
            self.whole(
                ranks
            ).mkdir()  # with features of an untrained classifier: to train one takes longer than the stages
            with torch.random.fork_rng():
                torch.manual_seed(0)
                save_file(Classifier(64, 10).state_dict(), self.whole(ranks) / "extractor.safetensors")
            for stage in ("pre", "mid"):
                line = self._training(self.whole(ranks), stage)
                codes, said = _ended(_started([line], folder, Case("train", "", (), ranks), False))
                if any(codes):
                    raise RuntimeError(f"the undisturbed {stage} on {ranks} ended with {codes}\n{said}")

    def whole(self, ranks: int) -> Path:
        return self.folder / f"whole-{ranks}"

    @staticmethod
    def _training(out: Path, stage: str) -> list[str]:
        return ["train", "digits", *kills.SMALL, *MORE, "--stages", stage, "--out", str(out)]

    def lived(self, case: Case, number: int) -> dict[str, Any]:
        """A row of the table; `wrong` says what is not as it should be."""
        out, whole = self.folder / f"{number}", self.whole(case.ranks)
        stage = "mid" if "rollouts" in case.at else "pre"
        out.mkdir()
        if case.what in ("train", "torchrun"):
            (out / "run").mkdir()
            shutil.copy(whole / "extractor.safetensors", out / "run")
            shutil.copytree(whole / "reference", out / "run" / "reference")
            if stage == "mid":
                shutil.copytree(whole / "pre", out / "run" / "pre")
        else:
            shutil.copytree(whole, out / "run")
        line = self._line(case, out / "run", stage)
        started = _started([line], out, case, True)
        after_s = _sent(started, case)
        codes, said = _ended(started, after_s)
        wrong = self._judged(case, codes, said)
        took = time.monotonic() - after_s
        if took > WITHIN_S and "nohup" not in case.at:  # which runs to its end
            wrong.append(f"{took:.0f} s late")
        if case.what in ("train", "torchrun"):
            wrong += self._goes_on(case, out, stage, started.seen)
        if wrong:
            wrong.append(said[-600:])
        return {"case": case.name, "what": case.what, "codes": codes, "s": round(took, 2), "wrong": wrong}

    def _line(self, case: Case, run: Path, stage: str) -> list[str]:
        lines = {
            "eval": ["eval", f"{run}/pre", "--n", "30", "--json"],
            "report": ["report", str(run)],
            "sample": ["sample", f"{run}/pre", "--n", "30", "--batch", "1", "--out", f"{run.parent}/samples.npz"],
            "trajectories": ["trajectories", "digits", *kills.SMALL, *MORE, "--stage", "mid", "--from", str(run), "-n", "64",
                             "--cache", f"{run.parent}/store", "--shard-rows", "8"],
            "watch": ["watch", str(run)],
        }  # fmt: skip
        return lines.get(case.what) or self._training(run, stage)

    @staticmethod
    def _judged(case: Case, codes: list[int], said: str) -> list[str]:
        """What is wrong with exit codes and words."""
        wanted = {exits.SIGNAL + case.numbers[0]}
        if "nohup" in case.at:
            wanted = {exits.DONE}
        elif case.what == "torchrun":
            wanted = {1, exits.SIGNAL + TERM, -TERM}  # its own, whatever its ranks give
        elif case.what == "watch" and case.numbers == (INT,):
            wanted = {exits.DONE}  # how a person ends it
        elif case.ranks > 1 or "not return" in case.at:
            wanted = {exits.SIGNAL + n for n in case.numbers}  # of several the first that came
        wrong = [] if set(codes) <= wanted else [f"exit codes {codes}, not {sorted(wanted)}"]
        if case.what != "torchrun" and "Traceback" in said:
            wrong.append("a traceback")
        stops = case.what in ("train", "sample") and "nohup" not in case.at and "terminal" not in case.at
        if stops and "to resume" not in said and "start" not in case.at:
            wrong.append("does not say how to go on")
        return wrong

    def _goes_on(self, case: Case, out: Path, stage: str, seen: list[mmap.mmap]) -> list[str]:
        """What is wrong with what is on disk, and with the end of the same command started again."""
        run, wrong = out / "run", []
        steps = checkpoint.steps(run / stage)
        begun = seen[0][STEP] if case.what == "train" else 1
        if case.at != "start" and begun > 1 and not steps:
            wrong.append("no checkpoint")
        if case.what == "train" and "nohup" not in case.at and steps and steps[-1] < begun - 1:
            wrong.append(f"the checkpoint is of step {steps[-1]}, and step {begun} had begun")
        if not kills.loadable(run, stage):
            wrong.append("a folder that cannot be loaded")
        if case.what == "torchrun":
            return wrong  # it is too long to be ended
        codes, said = _ended(
            _started([self._training(run, stage)], out, case._replace(what="train", at="again"), False)
        )
        if any(codes):
            wrong.append(f"does not go on: {codes} {said[-400:]}")
        else:
            wrong += kills.differences(run / stage, self.whole(case.ranks) / stage)
        return wrong


# ------------------------------------------------------------------------------------------------ processes


class Started(NamedTuple):
    """pids: of the ranks; seen: what each says it is at; log: of all."""

    pids: list[int]
    seen: list[mmap.mmap]
    log: Path
    case: Case
    terminal: int | None = None


def _started(lines: list[list[str]], out: Path, case: Case, held: bool) -> Started:
    """The command in its processes; held: slow where the case's signals are to meet it."""
    log, (line,) = out / "said.log", lines
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
        except SystemExit as ended:
            code = int(ended.code or 0)
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
}
READY = 8  # of the shared memory: the process is where its signals are to meet it


def _hold(case: Case, seen: mmap.mmap) -> None:
    """From now on this process is slow where the case is about, and says that it is there."""
    if case.at in ("start", "waiting"):
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


def _sent(started: Started, case: Case) -> float:
    """Wait until the process is there, and send it its signals. The time of the first."""
    end = time.monotonic() + 60
    if case.what == "import":
        while time.monotonic() < end and not _catches(started.pids[0], TERM):
            time.sleep(0.001)  # the interpreter's own start is not ours
        time.sleep(0.3 * case.numbers[0] / TERM)  # at one import or another
    elif case.what == "torchrun":
        while time.monotonic() < end and not checkpoint.steps(started.log.parent / "run" / "pre"):
            time.sleep(0.05)
    else:
        while time.monotonic() < end and not all(started.seen[r][READY] for r in case.to):
            time.sleep(0.002)
        time.sleep(0.3 if case.at in ("start", "waiting") else 0.02)
    first = time.monotonic()
    for i, number in enumerate(case.numbers):
        if i:
            time.sleep(0.1)
        if started.terminal is not None:
            os.close(started.terminal)  # which sends it SIGHUP
            continue
        for rank in case.to:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.pids[rank], number)
    return first


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
        return bool(mask >> (number - 1) & 1)
    return False


def _ended(started: Started, since: float | None = None) -> tuple[list[int], str]:
    """Exit codes by rank, 124 of one that had to be killed after 45 s (an undisturbed one: 120 s), and what was said."""
    end = (since or time.monotonic()) + (45 if since else 120)
    codes: dict[int, int] = {}
    while len(codes) < len(started.pids):
        for pid in started.pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = 124
        time.sleep(0.005)
    said = started.log.read_text("utf-8", "replace") if started.log.is_file() else ""
    return [codes[pid] for pid in started.pids], said
