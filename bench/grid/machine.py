"""Trains and judges cells, one after another, and keeps what each found.

    OUT/shared/pre-KEY, mid-KEY    pre-training and mid-training, once for all cells that begin there; figures in shared.json
    OUT/work/CELL-KEY              a cell while it is trained; gone when it is done
    OUT/cells/CELL.json            a cell that is done: digest of its run, and its row

So a grid is killed and started again at will: what is done is read, what is half done goes on from its checkpoint. The seconds
are processor seconds of the process that came to the end; a cell that was killed says how many times it was started.
A cell whose numbers are not finite is a row too.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from bench.grid import cells
from bench.grid.cells import ALONE, Cell
from bench.harness.results_file import commit, write_json
from cmt_fast.config import fingerprint
from cmt_fast.config.schema import Run
from cmt_fast.evaluation.judges import Judge
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from cmt_fast.usage import bills

FIGURES = ("frechet", "frechet_2", "sharpness", "precision", "recall", "precision_2", "recall_2", "accuracy")
SHARED = "shared.json"
STARTED = "started"


class Machine:
    """Of one folder. Opens one judge for each suite: real data are looked at once."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.judges: dict[str, Judge] = {}
        self.commit = commit()

    def known(self, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell that is done as it stands, else None."""
        file = self.out / "cells" / f"{cell.name}.json"
        if not file.is_file():
            return None
        kept = json.loads(file.read_text("utf-8"))
        return kept["row"] if kept["digest"] == cells.digest(cells.run_of(cell)) else None

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Train and judge a cell, or go on with it, or read what it found."""
        if (row := self.known(cell)) is not None:
            return row
        run = cells.run_of(cell)
        name = "mid" if cell.kind == ALONE else "post"
        parent = "pre" if cell.kind == ALONE or run.post.start != "mid" else "mid"
        folder = self.out / "work" / f"{cell.name}-{cells.digest(run)[:8]}"
        row: dict[str, Any] = {**cell._asdict(), "more": list(cell.more), **cells.spent(cell, run)}
        row |= {"starts": _starts(folder), "commit": self.commit, "parent": None, "cpu_s": {}}
        begin = time.process_time()
        try:
            parents = self.shared(cell, run, parent)
            row["parent"], begin = parents.name, time.process_time()
            work = Workspace(run, folder, parents)
            loop.train(work, [name])
            row["cpu_s"]["train"], begin = time.process_time() - begin, time.process_time()
            row["teacher_time_share"] = teacher_share(folder / name)
            row["steps"] = self.figures(cell.suite, work, name)
            row["cpu_s"]["judge"] = time.process_time() - begin
        except FloatingPointError as error:  # of a step, of one that it begins with, or of samples
            row["failed"] = str(error)
            row["cpu_s"]["failed"] = time.process_time() - begin
        write_json(self.out / "cells" / f"{cell.name}.json", {"digest": cells.digest(run), "row": row})
        shutil.rmtree(folder)
        return row

    def shared(self, cell: Cell, run: Run, name: str) -> Path:
        """The folder with the finished stages up to `name`, trained where they are not there yet."""
        key = fingerprint.content_digest(run, name)[:10]
        folder = self.out / "shared" / f"{name}-{key}"
        if (folder / SHARED).is_file():
            return folder
        if name == "mid" and not folder.is_dir():
            copied = folder.with_name(f".{folder.name}")
            shutil.rmtree(copied, ignore_errors=True)
            without = shutil.ignore_patterns(SHARED, "*.lock")
            shutil.copytree(self.shared(cell, run, "pre"), copied, ignore=without, copy_function=_linked)
            copied.rename(folder)
        work, begin = Workspace(run, folder), time.process_time()
        loop.train(work, [name])
        stage = work.stage(name)
        about = {
            "suite": cell.suite, "path": cell.path, "seed": cell.seed, "stage": name, "key": key, "arm": cell.arm,
            "images": stage.schedule.total * stage.schedule.batch, "forwards": cells.work(stage),
            "cpu_s": time.process_time() - begin, "steps": self.tolerant(cell.suite, work, name),
        }  # fmt: skip
        if name == "pre":
            about["solver"] = self.tolerant(cell.suite, work, name, (run.sampler.teacher_steps,), solver=True)
        write_json(folder / SHARED, about)
        return folder

    def tolerant(self, *arguments: Any, **more: Any) -> dict[str, dict[str, float]] | None:
        """The same, None where samples are not finite: what is begun from may have few steps in it that mean nothing."""
        try:
            return self.figures(*arguments, **more)
        except FloatingPointError:
            return None

    def figures(
        self, suite: str, work: Workspace, name: str, steps: tuple[int, ...] = (), solver: bool = False
    ) -> dict[str, dict[str, float]]:
        """{steps: figures} of a finished stage in both spaces. Raises FloatingPointError for samples that are not finite."""
        judge, n = self.judge(suite, work), work.run.eval.n
        net = work.network(name)
        found: dict[str, dict] = {}
        for k in (steps,) if steps else ((k,) for k in work.run.eval.steps):
            found |= work.judging.evaluate(net, k, n, solver=solver, judge=judge, quiet=True)
        return {k: {key: own[key] for key in FIGURES if key in own} for k, own in found.items()}

    def judge(self, suite: str, work: Workspace) -> Judge:
        """Opened by the first workspace that asks; the floor of real rows is taken with it."""
        if suite not in self.judges:
            self.judges[suite] = judge = work.judging.thorough
            file = self.out / f"floor-{suite}.json"
            if not file.is_file():
                floor = work.judging.floor(judge, work.run.eval.n) or {}
                write_json(file, {key: floor[key] for key in FIGURES if key in floor})
        return self.judges[suite]


def _linked(source: str, to: str) -> None:
    """A file of a checkpoint, which nobody writes into, is one on disk for all mid-trainings; others are copied."""
    if "/checkpoints/" in source:
        os.link(source, to)
    else:
        shutil.copy2(source, to)


def teacher_share(folder: Path) -> float | None:
    """Of the seconds of a stage's steps, those of rollouts: a ratio by one clock, which other work leaves alone."""
    bill = bills.of_stage(folder, checkpoint.complete(folder).manifest)
    phases = next(iter(bill.amounts.values()), {}) if bill else {}
    train, teacher = (phases[phase].seconds if phase in phases else 0.0 for phase in ("train", "teacher"))
    return teacher / (train + teacher) if train + teacher else None


def _starts(folder: Path) -> int:
    """How many times a cell was begun, this time among them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STARTED
    times = 1 + (int(file.read_text()) if file.is_file() else 0)
    file.write_text(str(times))
    return times
