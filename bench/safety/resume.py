"""A run that goes on from any of its steps ends as if it had never stopped; an epoch's rows are seen once on any number of ranks.

Every stage is trained in one go, LENGTH steps, and saved after each of the first 40. Then it goes on from each of these alone, by
a new workspace and engine: every WHOLE-th to its end, the others, which a signal stops, to the next step. What was saved there is
compared with what the run that never stopped had saved there: weights, EMA, optimizer, sums of the row of metrics, and its rows.
So each step is the first after a resume once, and each of these states is where the run goes on from next: by induction all end
alike. All in one process, which `leaks` shows to be the same as one of its own. The steps cut rows of metrics, which are of two
steps, and rounds of the pool anywhere. fp32 and bf16, four stages of the digits recipe: 320 resumes, 1.5 CPU minutes.

The second table trains two epochs on 1, then 2, 4 and 1 processes, stopped by a signal in between, and counts how often each row
of the data was drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness.results_file import Results
from bench.safety.leaks import bits, default, warm
from bench.training.zero import launch
from cmt_fast.config import loading
from cmt_fast.data.order import Order
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, signals
from cmt_fast.storage import checkpoint
from cmt_fast.train import batches, loop
from cmt_fast.train import steps as taking

STAGES, STEPS, BATCH = ("pre", "mid", "post", "control"), 40, 8
LENGTH = 100  # steps of a stage: the fewest of which a row of metrics is of two
SMALL = ["device=cpu", "model.width=16", "model.depth=1", "model.heads=2", "eval.n_during=40", "eval.batch=40"]
WHOLE = 8  # every so many-th checkpoint goes on to the stage's end
WORLDS = (1, 2, 4, 1)
EPOCHS, EPOCH_BATCH = 2, 12


def overrides(precision: str) -> list[str]:
    """Stages of LENGTH steps."""
    out = list(SMALL)
    for stage in STAGES:
        out += [f"{stage}.batch={BATCH}", f"{stage}.images_nimg={BATCH * LENGTH}", f"{stage}.warmup_nimg={2 * BATCH}"]
        out += [f"{stage}.checkpoint_every_nimg={BATCH * LENGTH}", f"{stage}.precision={precision}"]
        out += [f"{stage}.eval_every_nimg=null", f"{stage}.grid_every_nimg=null"]
    return [*out, "mid.trajectories.pool_steps=6", "post.trajectories.pool_steps=6"]


@contextlib.contextmanager
def patched(place: Any, name: str, value: Any) -> Iterator[None]:
    """A name of a class or module is another thing inside."""
    own = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, own)


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
    """A checkpoint is due by time after each of the first STEPS steps inside, and none is deleted."""
    save, step = checkpoint.save, taking.Steps._one

    def kept(*arguments: Any, **more: Any) -> Any:
        return save(*arguments, **{**more, "keep": 10**6})

    def taken(self: Any, now: int) -> float:
        self.clock.every_s = 0.0 if now < STEPS else None
        return step(self, now)

    with patched(checkpoint, "save", kept), patched(taking.Steps, "_one", taken), patched(taking, "LOOK_S", 0.0):
        yield


def whole(precision: str, folder: Path, stages: Sequence[str] = STAGES) -> None:
    """Stages in one go."""
    with keeping_all(), contextlib.redirect_stdout(io.StringIO()):
        loop.train(Workspace(loading.load("digits", overrides(precision)), folder), list(stages))


def resumed(precision: str, source: Path, stage: str, step: int, folder: Path, end: int = LENGTH) -> bool:
    """Whether a stage that has its checkpoint of a step alone, and all of its metrics, has the same bits after `end` steps."""
    shutil.rmtree(folder, ignore_errors=True)
    old = checkpoint.folder_of(source / stage, step)
    shutil.copytree(old, checkpoint.folder_of(folder / stage, step), copy_function=os.link)
    for file in (source / stage).iterdir():
        if file.is_file():
            shutil.copy(file, folder / stage)
    with contextlib.redirect_stdout(io.StringIO()), stopping_after(end):
        loop.train(Workspace(loading.load("digits", overrides(precision)), folder, source), [stage])
    return bits(folder / stage, end) == bits(source / stage, end)


@contextlib.contextmanager
def stopping_after(end: int) -> Iterator[None]:
    """A signal in the `end`-th step asks the run to stop; it saves and ends there."""
    step = taking.Steps._one

    def signalled(self: Any, now: int) -> float:
        lr = step(self, now)
        if now == end - 1 and end < LENGTH:
            os.kill(os.getpid(), signal.SIGUSR1)
        return lr

    with contextlib.ExitStack() as inside:
        for place, name, value in (
            (taking.Steps, "_one", signalled),
            (taking, "LOOK_S", 0.0),
            (signals, "_write", lambda _: None),
        ):
            inside.enter_context(patched(place, name, value))
        inside.enter_context(contextlib.suppress(signals.Stopped))
        yield


def drawn(folder: Path, engine: list[str]) -> dict[str, Any]:
    """Rows of the data by how often each was drawn in an epoch, on WORLDS one after the other."""
    rows = 1797
    total = -(-EPOCHS * rows // EPOCH_BATCH)
    text = [*SMALL, *engine, f"pre.batch={EPOCH_BATCH}", f"pre.images_nimg={total * EPOCH_BATCH}", "pre.warmup_nimg=0"]
    text += [f"pre.checkpoint_every_nimg={total * EPOCH_BATCH}", "pre.eval_every_nimg=null", "pre.grid_every_nimg=null"]
    stops = [total * (i + 1) // len(WORLDS) + i for i in range(len(WORLDS) - 1)]
    for part, n in enumerate(WORLDS):
        stop = stops[part] if part < len(stops) else None
        launch(n, _part(folder, text, part, stop), folder)
    seen, ends = Counter[tuple[int, int]](), []
    for file in sorted(folder.glob("drawn-*.json")):
        for epoch, row in json.loads(file.read_text("utf-8")):
            seen[epoch, row] += 1
    full = [[seen[epoch, row] for row in range(rows)] for epoch in range(EPOCHS)]
    ends = [sorted(Counter(counts).items()) for counts in full]
    return {"name": f"ranks {' -> '.join(map(str, WORLDS))}, {engine[-1] if engine else 'local'}", "rows": rows,
            "epochs": EPOCHS, "stops": stops, "wrong": sum(c != 1 for counts in full for c in counts), "times": ends}  # fmt: skip


def _part(folder: Path, text: list[str], part: int, stop: int | None) -> Callable[[], None]:
    """A group's work: go on with the run until a signal in the middle; each rank writes what it has drawn and trained."""

    def work() -> None:
        taking.LOOK_S, taken = 0.0, list[tuple[int, int]]()
        order, draw = Order.__call__, batches.BatchProvider.draw

        def noting(self: Any, position: Any) -> Any:
            row, epoch = order(self, position)
            taken.extend(zip(epoch.tolist(), row.tolist()))
            return row, epoch

        def signalled(self: Any, now: int, one: int = 0) -> Any:
            if now == stop and distributed.rank() == distributed.size() - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return draw(self, now, one)

        Order.__call__, batches.BatchProvider.draw = noting, signalled  # type: ignore[method-assign]
        run = Workspace(loading.load("digits", text), folder / "run")
        with contextlib.suppress(signals.Stopped):
            loop.train(run, ["pre"])
        (folder / f"drawn-{part}-{distributed.rank()}.json").write_text(json.dumps(taken), "utf-8")

    return work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, help="resumes of each stage and precision, drawn (default: all 40 steps)")
    parser.add_argument("--seed", type=int, default=0, help="of which steps are drawn")
    parser.add_argument("--precisions", default="fp32,bf16", help="(default: fp32,bf16)")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"(default: {','.join(STAGES)})")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/cpu/resume.json")


def run(arguments: argparse.Namespace) -> int:
    """Print both tables, write the JSON; 1 where a resume differs or a row was not drawn once."""
    warm()
    results = Results("resume", "cpu", arguments.json or default("resume"), steps=STEPS, batch=BATCH, worlds=WORLDS)
    draws, wrong = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:  # first, as autograd does not survive a fork
        for i, engine in enumerate(([], ["engine=zero", "zero_stage=2"])):
            folder = Path(name) / f"drawn-{i}"
            folder.mkdir()
            row = drawn(folder, engine)
            results.add(row)
            wrong += row["wrong"]
            print(
                f"{row['name']}: {row['epochs']} epochs of {row['rows']} rows, {row['wrong']} not drawn exactly once",
                flush=True,
            )
    results["not_once"], count, differ = wrong, 0, 0
    for precision in arguments.precisions.split(","):
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "whole"
            whole(precision, source)
            for stage in arguments.stages.split(","):
                steps = list(range(1, STEPS + 1))
                steps = sorted(draws.sample(steps, arguments.n)) if arguments.n else steps
                ends = {s: LENGTH if s % WHOLE == 0 else s + 1 for s in steps}
                other = [
                    s for s, end in ends.items() if not resumed(precision, source, stage, s, Path(name) / "again", end)
                ]
                far = sum(s % WHOLE == 0 for s in steps)
                results.add({"name": f"{stage} {precision}", "resumes": len(steps), "to_the_end": far, "differ": other})
                count, differ = count + len(steps), differ + len(other)
                print(f"{stage:>8} {precision}: {len(steps)} resumes, {len(other)} differ {other or ''}", flush=True)
    results["resumes"], results["differ"] = count, differ
    return int(bool(wrong or differ or not count))
