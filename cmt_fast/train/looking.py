"""Looks at a stage while it trains, none of which may cost a step of it: evaluations, grids, the page of the run.

A checkpoint is on disk before each (`unseen: true` in its manifest), and what a look raises is a row of metrics of kind "failed",
one line on stderr and no more: training goes on, on all ranks alike, unless `eval.on_error: stop`. A process that goes on from
such a checkpoint makes up for a look that is still owed, once; one that no process has survived so TRIES times is left out.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.runtime import distributed
from cmt_fast.storage import files, metrics_log, sound
from cmt_fast.storage.metrics_log import METRICS, Log

LONGEST = 300  # characters of an error that are kept
TRIED, TRIES = (
    "look.tried",
    3,
)  # the file of a stage that is there while a look is made up for: its step, and which try it is
ELSEWHERE = "another process failed, its output says why"


class Failed(RuntimeError):
    """A look failed, where `eval.on_error` is stop: on another rank, or for want of room on the disk."""


class Clock:
    """Whether a checkpoint is due by time: rank 0's clock decides, as `overdue` goes into a number that all ranks share."""

    def __init__(self, every_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """every_s: seconds between checkpoints, None for never by time; the first counts from here."""
        self.every_s, self.clock = every_s, clock
        self.last = clock()

    def overdue(self) -> bool:
        """Whether one is due, as rank 0 sees it; never on the others."""
        late = self.every_s is not None and self.clock() - self.last >= self.every_s
        return bool(late and distributed.rank() == 0)

    def saved(self) -> None:
        """One was written or is being written: the next is due `every_s` from now."""
        self.last = self.clock()


def attempt(what: str, call: Callable[[], object], stage: ResolvedStage, n: int, log: Log) -> bool:
    """Make one look after n steps, on all ranks together; whether it was made on all of them.

    What it raises goes into the metrics and onto stderr; with `eval.on_error: stop` it is raised here, `Failed` on ranks where
    nothing was, and for a full disk: no checkpoint is missing. A lost rank, a GPU that answers no more and a request to stop are
    no failures of a look: they are raised.
    """
    error: Exception | None = None
    try:
        call()
    except Exception as raised:
        if _fatal(raised):
            raise
        error = raised
    if not distributed.largest(int(error is not None)):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    text, nimg = told(error), stage.schedule.nimg(n)
    stops = stage.run.eval.on_error == "stop"
    log.row("failed", n, nimg, {"what": what, "error": text})
    if error is not None or distributed.rank() == 0:
        then = "training stops (eval.on_error: stop)" if stops else "training goes on (eval.on_error: continue)"
        print(f"cmt: {what} of {stage.name} after {nimg:,} images failed ({text}); {then}", file=sys.stderr, flush=True)
    if stops:
        own = error if error is not None and not files.is_full(error) else None
        raise own or Failed(f"{what} of {stage.name}: {text}") from error
    return False


def told(error: Exception | None) -> str:
    """An error in one line; of None, that it is another rank's."""
    if error is None:
        return ELSEWHERE
    return (" ".join(str(error).split()) or type(error).__name__)[:LONGEST]


def _fatal(error: Exception) -> bool:
    """Whether nothing can go on after it: another rank is gone, or the GPU refuses every later call."""
    sticky = getattr(torch, "AcceleratorError", None)
    broken = sticky is not None and isinstance(error, sticky) and not isinstance(error, torch.OutOfMemoryError)
    return broken or distributed.lost(error) is not None


def owed(stage: ResolvedStage, manifest: dict[str, Any]) -> bool:
    """Whether the look that was due after a checkpoint was not made, the same on all ranks: rank 0 looks at what is there. A
    collective call.
    """
    return bool(distributed.largest(int(distributed.rank() == 0 and unmade(stage, manifest))))


def unmade(stage: ResolvedStage, manifest: dict[str, Any]) -> bool:
    """The same as this process sees it, for who asks alone.

    Not of a checkpoint from which nothing can go on any more, as files of it were removed.
    """
    return bool(manifest.get("unseen")) and not manifest.get("pruned") and _wanted(stage, manifest["step"])


def _wanted(stage: ResolvedStage, step: int) -> bool:
    if _made(stage, step):
        return False
    if _tries(stage, step) < TRIES:
        return True
    text = f"the look at {stage.name} after step {step:,} is left out: {TRIES} processes were killed within it"
    print(f"cmt: {text}", file=sys.stderr, flush=True)
    return False


def _tries(stage: ResolvedStage, step: int) -> int:
    """How many processes have begun to make up for this look and were killed within it."""
    try:
        at, tries = map(int, sound.data(stage.folder / TRIED).split())
    except (FileNotFoundError, sound.Unsound, ValueError):
        return 0
    return tries if at == step else 0


@contextlib.contextmanager
def made_up(stage: ResolvedStage, step: int) -> Iterator[None]:
    """Around a look that is made up for: what ends the process within it, and is no error of Python's, is counted."""
    first, place = distributed.rank() == 0, stage.folder / TRIED
    if first:
        with contextlib.suppress(OSError):
            files.write_text(place, f"{step} {_tries(stage, step) + 1}\n")
    try:
        yield
    finally:
        if first:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)


def _made(stage: ResolvedStage, step: int) -> bool:
    """Whether what is due after `step` steps is on disk. Only the end of the metrics is read."""
    plan = stage.schedule
    last = step >= plan.total
    if plan.draws(step, last) and not (stage.folder / "grids" / f"{step:08d}.png").is_file():
        return False
    if not plan.evaluates(step, last):
        return True
    try:
        of = metrics_log.seeds(stage.folder)
        with open(sound.handle(stage.folder / METRICS), "rb") as file:
            for _, line in metrics_log.backwards(file):
                row = metrics_log.parsed(line, of) or {}
                if row.get("step") == step and row.get("kind") == "eval":
                    return True
                if isinstance(row.get("step"), int) and row["step"] < step:
                    return False
    except (OSError, sound.Unsound):
        pass
    return False
