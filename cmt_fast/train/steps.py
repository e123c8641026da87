"""The steps of a stage, each with the row of metrics, the checkpoint and the look that are due after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cmt_kernels
import torch
from torch import Tensor

from cmt_fast.engine import Engine
from cmt_fast.engine.graph import StepGraph
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.runtime.signals import Stopped
from cmt_fast.storage import checkpoint
from cmt_fast.storage.metrics_log import Log
from cmt_fast.train import (
    batches,
    looking,
    monitor,
    nonfinite,
)
from cmt_fast.train.half_way import HalfWay
from cmt_fast.train.saving import REFUSED, Saver
from cmt_fast.usage import ledger, meters

LOOK_S = 2.0  # seconds between looks for a signal: torchrun gives its processes 30 to save and end


class Steps(NamedTuple):
    """The steps of a stage: what they are taken with, and where their metrics and checkpoints go.

    gradient: adds the gradient of a part of a step to the engine's; wall: seconds of the steps that count, save_s those in
    which none ran for a save; always: what every checkpoint of the stage says alike; page: of the run, drawn half-way.
    """

    work: Workspace
    stage: ResolvedStage
    engine: Engine
    source: batches.BatchProvider
    gradient: StepGraph
    log: Log
    shown: progress.Stage
    account: ledger.Account
    meter: meters.Meter
    sums: Sums
    wall: dict[str, float]
    always: dict[str, Any]
    page: HalfWay
    saver: Saver
    clock: looking.Clock
    guard: nonfinite.Guard

    def take(self, steps: Iterable[int], asked: list[int]) -> None:
        """Take them, each with the row of metrics, the checkpoint and then the look that are due after it.

        Raises NotFinite or RollBack where a step is not finite, and Stopped where a signal asked for it, after a checkpoint.
        """
        plan, wall, look_every, begun, took_s = self.stage.schedule, self.wall, 1, self.engine.step_count, 0.0
        for step in steps:
            n, last = step + 1, step + 1 == plan.total
            # asking costs a collective call and waits for the device: every row, and every LOOK_S between
            row = n % plan.log_every == 0 or last
            asks = row or n % look_every == 0
            try:
                lr = self.guard.take(step, self._one, row, asks or n % plan.checkpoint_every == 0)
            except Stopped as within:  # a round of rollouts, before anything of this step counted
                self._leave(within)
            stop, overdue = self._asked(asked) if asks else (0, False)
            distributed.beat(n)
            if row or stop or overdue:
                took_s += (lap := self.meter.lap("train"))
                wall["train_s"] += lap
            look = row and monitor.looks(self.stage, n, last)
            if row:
                self._row(n, lr)
                # by the pace of this process: the one before may have had more machines
                look_every = distributed.smallest(max(1, int(LOOK_S * (n - begun) / took_s)))
                monitor.keep(self.stage, n, last, self.saver)
            # before a look, which can cost no step then; one who stops leaves it to who goes on
            if n % plan.checkpoint_every == 0 or last or stop or overdue or look:
                self._checkpoint(n, last, unseen=look, end=last or bool(stop))
            if look and (last or not stop):
                self.observe(n, last)
            self.shown.step(n, lambda n=n: self.sums.loss(self._since(n) - self.guard.missing))
            if stop and not last:
                raise Stopped(128 + stop)

    def _asked(self, asked: list[int]) -> tuple[int, bool]:
        """The signal that asks any rank to stop, 0 for none, and whether a checkpoint is due by time: one collective call."""
        code = distributed.largest(2 * self.saver.asks(asked[0] if asked else 0) + self.clock.overdue())
        stop, overdue = code // 2, bool(code % 2)
        if stop >= REFUSED:
            self.saver.finish()
        return stop, overdue

    def _leave(self, stopped: Stopped) -> NoReturn:
        """A stop within a round of rollouts: the checkpoint of the steps that are done, unless it is there. Raises Stopped.

        Nothing is saved where a step since the last checkpoint was not finite and is not decided on: it is taken again.
        """
        n = self.engine.step_count
        self.saver.finish()
        if self.guard.undecided:
            raise Stopped(stopped.code, "what no checkpoint has is trained again") from None
        there = distributed.rank() == 0 and checkpoint.steps(self.stage.folder)[-1:] == [n]
        if n and not distributed.largest(int(there)):
            self.wall["train_s"] += self.meter.lap("train")
            self._checkpoint(n, False, unseen=False, end=True)
        raise (Stopped(stopped.code) if n else stopped) from None

    def observe(self, n: int, last: bool) -> None:
        """The look that is due after n steps, with the memory of the step's graph."""
        self.gradient.release()
        with self.shown.pause(monitor.title(self.work, self.stage, n, last)):
            monitor.observe(
                self.work, self.stage, self.engine, n, last, self.log, self.source.held, self.wall["eval_s"]
            )
            looking.attempt("the page", self.page.draw, self.stage, n, self.log)
        self.wall["eval_s"] += self.meter.lap("evaluation")
        self.log.commit()
        self.account.settle(n, end=False)  # of the checkpoint before it, which does not know what it cost

    def _since(self, n: int) -> int:
        """Steps of the row of metrics that step n is in."""
        every = self.stage.schedule.log_every
        return n - (n - 1) // every * every

    def _one(self, step: int) -> float:
        """Gradients of every part of a step, and the optimizer's step. Returns its learning rate."""
        parts, before, losses = self.engine.grad_accum_steps, self.sums.kept(), []
        for part in range(parts):
            try:
                drawn = self._drawn(step, part)
            except Stopped:
                self.sums.sums = before
                raise
            self.sums.add(given := self.gradient(drawn), parts)
            losses.append(given["loss"].clone())
        lr = self.stage.schedule.lr(self.stage.config, step)
        self.sums.add({"grad_norm": (norm := self.engine.step(lr))})
        self.sums.only_where(self.guard.saw(step, losses, norm), before)
        return lr

    def _drawn(self, step: int, part: int) -> Any:
        """What the source draws; where its memory ends, as of a round of rollouts, once more without the step's graph.

        Not on several ranks: a round and the proof of a graph are made by all together, and the others have memory.
        """
        try:
            return self.source.draw(step, part)
        except torch.OutOfMemoryError:
            if distributed.size() > 1:
                raise
            self.gradient.release()
        return self.source.draw(step, part)

    def _row(self, n: int, lr: float) -> None:
        """A row of metrics after n steps: means since the row before."""
        nimg = self.stage.schedule.nimg(n)
        means = self.sums.means(self._since(n) - self.guard.row)
        if not means:  # every step since the last row was skipped
            return
        speed = nimg / self.wall["train_s"]
        self.saver.told()
        written = {"written_s": self.saver.write_s} if self.saver.write_s else {}  # beside the steps, by this process
        spent = {**self.wall, **written, "images_per_s": speed, "bill": self.account.add()}
        self.log.row("train", n, nimg, {**means, "lr": lr, **self.engine.scaling(), **self.guard.told()}, spent)
        self.shown.saw(means["loss"])
        self.shown.spent(self.account.bill.total(self.meter.unit).hours, self.account.held)

    def _checkpoint(self, n: int, last: bool, unseen: bool, end: bool) -> None:
        """A checkpoint after n steps. unseen: a look is due after it, for which it is waited for; end: no step comes after it."""
        rows = self.log.commit()
        nimg = self.stage.schedule.nimg(n)
        now = {"nimg": nimg, "done": last, "unseen": unseen, "wall": dict(self.wall), "bill": self.account.add()} | rows
        now |= {"proofs": dict(cmt_kernels.proofs()), **self.guard.stored(), **self.guard.checks.stored()}
        with progress.phase("writing a checkpoint"):
            _save(self.stage.folder, n, self.saver, self.always | now, self.sums, self.guard.missing)
            if end or unseen:
                self.saver.finish()
        self.wall["save_s"] += self.meter.lap("checkpoint")
        self.clock.saved()
        if end or unseen:
            return self.account.settle(n, end=end and not last)
        bill = self.account.add()
        self.saver.when_written(lambda: self.account.stands(n, bill))


class Sums:
    """Scalars of the steps since the last row of metrics; they stay on their device until a row or a checkpoint is due."""

    def __init__(self, found: checkpoint.Checkpoint | None) -> None:
        """found: its row may have been cut in two; this rank goes on with its own part, or the mean if ranks are others."""
        row, self.sums = found.manifest.get("row") if found else None, dict[str, Tensor]()
        if row:
            ranks = row["sums"]
            same = len(ranks) == distributed.size()
            mine = ranks[distributed.rank()] if same else [sum(s) / len(ranks) for s in zip(*ranks)]
            self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in zip(row["keys"], mine)}

    def add(self, scalars: dict[str, Tensor], grad_accum_steps: int = 1) -> None:
        """Scalars of one part of a step."""
        for key, value in scalars.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.double() / grad_accum_steps

    def kept(self) -> dict[str, Tensor]:
        """What is summed so far, for `only_where`."""
        return dict(self.sums)

    def only_where(self, sound: Tensor, before: dict[str, Tensor]) -> None:
        """Leave out what came since `before` was kept, unless it is sound, (); nobody waits for the device to know."""
        for key, value in self.sums.items():
            self.sums[key] = torch.where(sound, value, before.get(key, torch.zeros_like(value)))

    def means(self, steps: int) -> dict[str, float]:
        """Over the steps of a row and all ranks; the next row begins."""
        found = {k: float(distributed.mean_(v.clone()) / steps) for k, v in self.sums.items()} if steps else {}
        self.sums = {}
        return found

    def loss(self, steps: int) -> float | None:
        """This rank's mean over the steps since the last row, None where there was none; waits for the device."""
        return float(self.sums["loss"]) / steps if "loss" in self.sums and steps else None

    def state(self) -> dict | None:
        """What a checkpoint in the middle of a row keeps: every rank's sums."""
        ranks = distributed.every_rank([float(v) for v in self.sums.values()])
        return {"keys": list(self.sums), "sums": ranks} if self.sums else None


def _save(folder: Path, step: int, saver: Saver, about: dict, sums: Sums, missing: int) -> None:
    """A checkpoint, written by rank 0; all ranks take part in gathering it. Raises OSError on all if the disk has refused.

    missing: steps of the row that it cuts in two that were skipped.
    """
    row = sums.state()
    if missing:
        row = {**(row or {"keys": [], "sums": [[] for _ in range(distributed.size())]}), "missing": missing}
    saver.save(folder, step, {**about, "row": row})
