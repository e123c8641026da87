"""Loss curves of the zero engine beside the local one, and checkpoints from any ZeRO stage and world size into any other.

Every setting (engine, ZeRO stage, number of CPU processes) trains the same 50 steps of denoising, of CMT and of
MeanFlow on digits in fp32; the figure is the largest relative difference of the loss from the local engine's on one
process, over all steps. Then each setting's checkpoint in the middle of the denoising run is loaded by every other
one, written again and compared bit by bit, and trained to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast import checkpoint, config, distributed, loop, stages, workspace
from cmt_fast import engine as engines
from cmt_fast.workspace import Workspace

STEPS, BATCH = 50, 32
SMALL = ["model.width=32", "model.depth=2", "model.heads=2"]
# what is compared: recipe, stage
CASES = {"denoise": ("digits", "pre"), "cmt": ("digits", "mid"), "meanflow": ("digits-mf", "control")}


class Setting(NamedTuple):
    """An engine on a number of processes; stage None is the local engine."""

    stage: int | None
    processes: int

    @property
    def name(self) -> str:
        """As tables and folders call it."""
        return f"{'local' if self.stage is None else f'zero{self.stage}'}-{self.processes}"

    @property
    def overrides(self) -> list[str]:
        """What a run is told."""
        return ["device=cpu"] + ([] if self.stage is None else ["engine=zero", f"zero_stage={self.stage}"])


def settings(worlds: list[int]) -> list[Setting]:
    """The local engine on one process, then every engine and ZeRO stage on each number of processes."""
    return [Setting(None, 1)] + [Setting(s, n) for n in worlds for s in (None, 0, 1, 2, 3)]


def small(stage: str, steps: int = STEPS) -> list[str]:
    """Overrides that make a stage `steps` steps long, with a row of metrics at each and a checkpoint in the middle."""
    more = ["mid.trajectories.pool_steps=4"] if stage == "mid" else []
    length = [f"{stage}.images_nimg={BATCH * steps}", f"{stage}.checkpoint_every_nimg={BATCH * steps // 2}"]
    quiet = [f"{stage}.eval_every_nimg=null", f"{stage}.grid_every_nimg=null", f"{stage}.warmup_nimg=0"]
    return [*SMALL, *length, *quiet, *more, f"{stage}.batch={BATCH}"]


def launch(processes: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do jobs one after the other in one group of processes. Raises RuntimeError with the end of what they said."""
    plan = folder / f"jobs-{processes}-{len(list(folder.glob('jobs-*')))}.json"
    plan.write_text(json.dumps(jobs))
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *group, "-m", "bench", "zero", "--worker", str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def work(plan: Path) -> int:
    """What one process of a group does."""
    import torch

    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), timeout_s=300)
    for job in json.loads(plan.read_text()):
        space = Workspace(config.load(job["recipe"], job["overrides"]), Path(job["out"]), Path(job["parents"]))
        if job["do"] == "train":
            loop.train(space, [job["stage"]])
        else:
            again(space, job["stage"])
        distributed.barrier()
    distributed.stop()
    return 0


def again(space: Workspace, name: str) -> None:
    """Load a stage's last checkpoint into an engine and write what the engine then holds to OUT/again."""
    stage = space.run.stage(name)
    passes = stages.passes(space.run, name, distributed.size())
    engine = engines.build(space.run, space.build(), stage, space.device, passes, space.sizing(name))
    found = checkpoint.latest(space.folder / name)
    engine.load({f: found.stream(f) for f in engine.state()}, found.manifest["step"])
    checkpoint.save(space.folder / "again", engine.step_count, engine.state(), {}, write=distributed.rank() == 0)


def losses(folder: Path) -> list[float]:
    """The loss of every step of a stage."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def relative(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves of equal length."""
    assert len(a) == len(b) and a, (len(a), len(b))
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def curves(folder: Path, every: list[Setting], cases: dict[str, tuple[str, str]], more: tuple[str, ...] = ()) -> dict:
    """{case: {setting: largest relative difference from local on one process}}; leaves the runs in `folder`."""
    base = folder / "base"
    for recipe in {recipe for recipe, stage in cases.values() if stage != "pre"}:
        run = ["device=cpu", *small("pre"), "pre.checkpoint_every_nimg=null", *more]
        job = {"do": "train", "recipe": recipe, "stage": "pre", "overrides": run}
        launch(1, [job | {"out": str(base / recipe), "parents": str(base / recipe)}], folder)
    for n in sorted({s.processes for s in every}):
        jobs = []
        for setting in (s for s in every if s.processes == n):
            for case, (recipe, stage) in cases.items():
                text = [*setting.overrides, *small("pre"), *(small(stage) if stage != "pre" else []), *more]
                out = {"out": str(folder / setting.name / case), "parents": str(base / recipe)}
                jobs.append({"do": "train", "recipe": recipe, "stage": stage, "overrides": text, **out})
        launch(n, jobs, folder)
    table: dict[str, dict[str, float]] = {}
    for case, (_, stage) in cases.items():
        truth = losses(folder / every[0].name / case / stage)
        table[case] = {s.name: relative(losses(folder / s.name / case / stage), truth) for s in every[1:]}
    return table


def exchange(folder: Path, every: list[Setting], pairs: list[tuple[Setting, Setting]]) -> dict[str, dict]:
    """Load the checkpoint in the middle of `curves`' denoising runs into other settings.

    {"a to b": {"equal": bits after writing it again, "loss": largest relative difference of the second half from a's}}.
    """
    where = lambda a, b: folder / "exchange" / f"{a.name}-to-{b.name}"
    for n in sorted({b.processes for _, b in pairs}):
        jobs = []
        for a, b in (p for p in pairs if p[1].processes == n):
            source, out = folder / a.name / "denoise", where(a, b)
            shutil.copytree(
                source / "pre" / "checkpoints" / f"step-{STEPS // 2:08d}",
                out / "pre" / "checkpoints" / f"step-{STEPS // 2:08d}",
            )
            shutil.copy(source / "pre" / "metrics.jsonl", out / "pre")
            job = {
                "recipe": "digits",
                "stage": "pre",
                "overrides": [*b.overrides, *small("pre")],
                "out": str(out),
                "parents": str(out),
            }
            jobs += [{"do": "again", **job}, {"do": "train", **job}]
        launch(n, jobs, folder)
    table = {}
    for a, b in pairs:
        files = [
            checkpoint.verify(checkpoint.folder_of(f, STEPS // 2)).manifest["files"]
            for f in (folder / a.name / "denoise" / "pre", where(a, b) / "again")
        ]
        ends = [losses(f / "pre")[STEPS // 2 :] for f in (where(a, b), folder / a.name / "denoise")]
        final = [checkpoint.complete(f / "pre").manifest["files"] for f in (where(a, b), folder / a.name / "denoise")]
        table[f"{a.name} to {b.name}"] = {
            "equal": files[0] == files[1],
            "loss": relative(*ends),
            "end_equal": final[0] == final[1],
        }
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worlds", default="2,4", help="numbers of processes (default: 2,4)")
    parser.add_argument("--cases", default=",".join(CASES), help="what is trained")
    parser.add_argument("--exchange", action="store_true", help="load every setting's checkpoint into every other")
    parser.add_argument("--keep", type=Path, help="leave the runs here")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print both tables."""
    if arguments.worker:
        return work(arguments.worker)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="zero-"))
    folder.mkdir(parents=True, exist_ok=True)
    every = settings([int(n) for n in arguments.worlds.split(",")])
    try:
        figures: dict[str, Any] = {"curves": curves(folder, every, {k: CASES[k] for k in arguments.cases.split(",")})}
        for case, row in figures["curves"].items():
            print(f"{case:>9}: " + "  ".join(f"{name} {error:.1e}" for name, error in row.items()))
        if arguments.exchange:
            figures["exchange"] = exchange(folder, every, [(a, b) for a in every for b in every])
            for name, row in figures["exchange"].items():
                print(f"{name:>18}: equal {row['equal']}  loss {row['loss']:.1e}  end equal {row['end_equal']}")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({**figures, "environment": workspace.environment()}, indent=1) + "\n")
    return 0
