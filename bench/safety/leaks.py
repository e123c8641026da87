"""Stage after stage in one process, beside each stage in a process of its own: checkpoints and metrics are the same bits.

One group of processes trains every case of its size, engine after engine, each with all its stages, so that whatever an engine,
a teacher or an evaluation leaves behind meets all that come later; stage 3 of ZeRO and a sharded teacher come first. The same
stages are then trained each by a group of processes that was forked for it alone. What each case leaves in the first rank's
process is listed too (runtime/leftovers.py). Networks are tiny, stages of a few steps, mid-training with an evaluation half-way.

The whole table is 34 cases, 102 hand-overs, about 6 CPU minutes; `--n 3 --worlds 2` takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cmt_fast.engine.zero  # noqa: F401  which each would import
from bench.harness.results_file import Results
from bench.training.zero import Failed, do, launch
from cmt_fast.config import loading
from cmt_fast.data import datasets
from cmt_fast.evaluation import features
from cmt_fast.runtime import distributed, leftovers
from cmt_fast.storage import checkpoint, metrics_log

STAGES = ("pre", "mid", "post")
STEPS, BATCH = 4, 16
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "eval.n_during=40", "eval.batch=40", "device=cpu"]


class Case(NamedTuple):
    """How the stages of a run are trained; zero: ZeRO's stage, None for the local engine."""

    processes: int
    precision: str
    zero: int | None
    sharded: bool

    @property
    def name(self) -> str:
        """As tables and folders call it."""
        engine = "local" if self.zero is None else f"zero{self.zero}{'-sharded' if self.sharded else ''}"
        return f"{self.processes}-{self.precision}-{engine}"

    def overrides(self) -> list[str]:
        """What the run is told."""
        out = list(SMALL)
        for stage in STAGES:
            out += [f"{stage}.batch={BATCH}", f"{stage}.images_nimg={BATCH * STEPS}", f"{stage}.warmup_nimg=0"]
            out += [f"{stage}.eval_every_nimg={BATCH * STEPS // 2 if stage == 'mid' else 'null'}"]
            out += [f"{stage}.grid_every_nimg=null", f"{stage}.checkpoint_every_nimg={BATCH * STEPS}"]
            out += [f"{stage}.precision={self.precision}"]
        out += ["mid.trajectories.pool_steps=4", "post.trajectories.pool_steps=4"]
        if self.zero is not None:
            teacher = "sharded" if self.sharded else "whole"
            out += ["engine=zero", f"zero_stage={self.zero}", f"zero_teacher={teacher}"]
        return out

    def jobs(self, out: Path) -> list[dict[str, Any]]:
        """The stages, as bench/training/zero.py does them."""
        place = {"out": str(out / self.name), "parents": str(out / self.name)}
        text = self.overrides()
        return [{"do": "train", "recipe": "digits", "stage": s, "overrides": text, **place} for s in STAGES]


def cases(worlds: list[int]) -> list[Case]:
    """All of them, those that leave most behind first."""
    out = []
    for n in worlds:
        for zero, sharded in ((3, True), (3, False), (2, False), (1, False), (0, False), (None, False)):
            out += [Case(n, p, zero, sharded) for p in ("fp32", "bf16") if n > 1 or not sharded]
    return out


def together(mine: list[Case], out: Path, file: Path) -> Callable[[], None]:
    """The work of one group: every case, all stages; the first rank writes what each has left behind."""

    def work() -> None:
        before, left = leftovers.Process(whole=True), {}
        for case in mine:
            do(case.jobs(out))()
            left[case.name] = before.changed(leftovers.Process(whole=True))
        if distributed.rank() == 0:
            file.write_text(json.dumps(left), encoding="utf-8")

    return work


def bits(stage: Path, step: int | None = None) -> str:
    """All that a stage has after a step, its last: checksums of the checkpoint's files, sums of the row of metrics that it cuts
    in two, and its rows so far without times."""
    place = checkpoint.folder_of(stage, step) if step else checkpoint.complete(stage).folder
    manifest = checkpoint.sized(place).manifest
    rows = [{k: v for k, v in row.items() if k != "wall"} for row in metrics_log.rows(stage / metrics_log.METRICS)]
    sofar = [row for row in rows if row.get("step", 0) <= manifest["step"]]
    return json.dumps([manifest["files"], manifest.get("row"), manifest["nimg"], sofar], sort_keys=True)


def judge(folder: Path) -> Path:
    """A file of the features that digits are judged in, which every run would train for itself: a second of each process."""
    data = datasets.load(loading.load("digits", []).data)
    launch(1, lambda: features.extractor(data, folder) and None, folder)
    return folder / "extractor.safetensors"


def compared(mine: list[Case], folder: Path, tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """A row of each case: stages that differ, and what was left behind. All are of one number of processes."""
    n, one, own, file = mine[0].processes, folder / "one", folder / "own", folder / "left.json"
    features_file = judge(folder)
    for place in [out / case.name for case in mine for out in (one, own)]:
        place.mkdir(parents=True)
        shutil.copy(features_file, place)
    launch(n, together(mine, one, file), folder)
    left, rows = json.loads(file.read_text("utf-8")), []
    for case in mine:
        for job in case.jobs(own):
            launch(n, do([job]), folder)
        differ = [s for s in STAGES if bits(one / case.name / s) != bits(own / case.name / s)]
        rows.append({"name": case.name, "stages": len(STAGES), "differ": differ, "left": left[case.name]})
        tell(rows[-1])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--worlds", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    parser.add_argument("--n", type=int, help="so many cases of each number of processes (default: all)")
    parser.add_argument("--cases", help="these alone, by name: PROCESSES-PRECISION-ENGINE,... as 4-fp32-zero2")
    parser.add_argument("--seed", type=int, help="train the cases in another order, drawn from this")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/cpu/leaks.json")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 where a stage differs or something was left behind."""
    warm()
    results = Results("leaks", "cpu", arguments.json or default("leaks"), steps=STEPS, batch=BATCH)
    named = arguments.cases.split(",") if arguments.cases else []
    every = [cases([n]) for n in map(int, arguments.worlds.split(","))]
    every = [mine for mine in ([c for c in all_ if not named or c.name in named] for all_ in every) if mine]
    results.plan(case.name for mine in every for case in mine)
    failed = ""

    def tell(row: dict[str, Any]) -> None:
        results.add(row)
        results.done(row["name"])
        verdict = f"differ: {', '.join(row['differ'])}" if row["differ"] else "equal"
        print(
            f"{row['name']:>24}: {row['stages']} stages {verdict}; left behind: {'; '.join(row['left']) or 'nothing'}",
            flush=True,
        )

    for mine in every:
        if arguments.seed is not None:
            random.Random(arguments.seed).shuffle(mine)
        with tempfile.TemporaryDirectory() as name:
            try:
                compared(mine[: arguments.n], Path(name), tell)
            except Failed as error:
                failed = str(error)
                print(failed, flush=True)
    rows = results["rows"]
    results["cases"], results["hand_overs"] = len(rows), sum(row["stages"] for row in rows)
    results["differ"], results["left"] = sum(len(r["differ"]) for r in rows), sum(len(r["left"]) for r in rows)
    print(
        f"{results['cases']} cases, {results['hand_overs']} stages: {results['differ']} differ, {results['left']} left behind"
    )
    return int(bool(failed or not rows or results["differ"] or results["left"]))


def warm() -> None:
    """Import once, before the forks, what every process needs, and let no collection of theirs touch its pages: 1 to 2 CPU
    seconds of each."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  of 0.19, imports a compiler: 2 s in every child
    import setuptools  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    for name in ("ops.op_builder.all_ops", "module_inject.auto_ep_layer", "runtime.superoffload.superoffload_stage3"):
        with contextlib.suppress(ImportError):  # of some versions of DeepSpeed
            importlib.import_module(f"deepspeed.{name}")
    gc.collect()
    gc.freeze()


def default(name: str) -> Path | None:
    """bench/results/cpu/NAME.json, where OUT does not say otherwise."""
    from bench.harness.results_file import ROOT

    return None if os.environ.get("OUT") else ROOT / "bench" / "results" / "cpu" / f"{name}.json"
