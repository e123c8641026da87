"""Loss curves of the zero engine beside the local one, and checkpoints from any ZeRO stage and world size into any other.

Every setting (engine, ZeRO stage, number of CPU processes) trains the same 50 steps of denoising, of CMT and of
MeanFlow on digits in fp32; the figure is the largest relative difference of loss and mean squared error from the
local engine's on one process, over all steps. With --exchange the checkpoint in the middle of a short run of each
setting is loaded by every setting, written again and compared bit by bit, and trained to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from bench.harness import results_file
from cmt_fast.config import loading
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, machine
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop

STEPS, SHORT, BATCH = 50, 8, 32  # steps of the curves, and of the runs whose checkpoints are exchanged
CURVES = ("loss", "mse")
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


def launch(
    processes: int, work: Callable[[], Any], folder: Path, timeout_s: float = 300, patience_s: float = 10
) -> None:
    """Call `work` in a group of forked processes, as a launcher would start them; what they say goes to FOLDER/*.log.

    The caller must not have run a backward pass: autograd does not survive a fork. Raises Failed when one fails; the
    others have `patience_s` to see it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"group-{port}-{rank}.log" for rank in range(processes)]
    children = {}
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        child = os.fork()
        if not child:
            _child(work, environment, log, timeout_s)
        children[child] = rank
    codes: dict[int, int] = {}
    deadline = float("inf")
    while children:
        child, status = next((end for other in children if (end := os.waitpid(other, os.WNOHANG))[0]), (0, 0))
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if status and deadline == float("inf"):
                deadline = time.monotonic() + patience_s
        elif time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    if any(codes.values()):
        raise Failed(codes, {rank: log.read_text() for rank, log in enumerate(logs)})


class Failed(RuntimeError):
    """A process of a group ended with an error. codes: exit code by rank, negative for a signal; logs: what each said."""

    def __init__(self, codes: dict[int, int], logs: dict[int, str]) -> None:
        first = next(rank for rank, code in codes.items() if code)
        super().__init__(f"rank {first} of {len(logs)} failed: {logs[first][-4000:]}")
        self.codes, self.logs = codes, logs


def _child(work: Callable[[], Any], environment: dict[str, Any], log: Path, timeout_s: float) -> NoReturn:
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update({key: str(value) for key, value in environment.items()})
        torch.set_num_threads(1)
        distributed.start(torch.device("cpu"), timeout_s)
        code = work() or 0  # an exit code, as the command's, which leaves the group itself
        if distributed.size() > 1:
            distributed.barrier()
        distributed.stop()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def do(jobs: list[dict[str, Any]]) -> Callable[[], None]:
    """A group's work: train each job's stage, or load its checkpoint and write it again."""

    def work() -> None:
        for job in jobs:
            space = Workspace(loading.load(job["recipe"], job["overrides"]), Path(job["out"]), Path(job["parents"]))
            if job["do"] == "train":
                loop.train(space, [job["stage"]])
            else:
                again(space, job["stage"])

    return work


def again(space: Workspace, name: str) -> None:
    """Load a stage's last checkpoint into an engine and write what the engine then holds to OUT/again."""
    stage = space.stage(name)
    passes = stage.grad_accum_steps(distributed.size())
    engine = space.engine_of(stage, passes, space.sharding_plan(stage), found=True)
    found = checkpoint.latest(space.folder / name)
    engine.load({f: found.stream(f) for f in engine.state()}, found.manifest["step"])
    checkpoint.save(space.folder / "again", engine.step_count, engine.state(), {}, write=distributed.rank() == 0)


def losses(folder: Path, keys: tuple[str, ...] = CURVES) -> list[float]:
    """Loss and mean squared error of every step of a stage: MeanFlow's loss divides by itself and says little alone."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["kind"] == "train" for key in keys]


def relative(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves of equal length."""
    assert len(a) == len(b) and a, (len(a), len(b))
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def curves(folder: Path, every: list[Setting], cases: dict[str, tuple[str, str]], steps: int = STEPS) -> dict:
    """{case: {setting: {"loss", "mse": largest relative difference from local on one process}}}; leaves the runs in `folder`."""
    base = folder / "base"
    for recipe in {recipe for recipe, stage in cases.values() if stage != "pre"}:
        run = ["device=cpu", *small("pre", steps)]
        job = {"do": "train", "recipe": recipe, "stage": "pre", "overrides": run}
        launch(1, do([job | {"out": str(base / recipe), "parents": str(base / recipe)}]), folder)
    for n in sorted({s.processes for s in every}):
        jobs = []
        for setting in (s for s in every if s.processes == n):
            for case, (recipe, stage) in cases.items():
                text = [*setting.overrides, *small("pre", steps), *small(stage, steps)]
                out = {"out": str(folder / setting.name / case), "parents": str(base / recipe)}
                jobs.append({"do": "train", "recipe": recipe, "stage": stage, "overrides": text, **out})
        launch(n, do(jobs), folder)
    table: dict[str, dict[str, dict[str, float]]] = {case: {} for case in cases}
    for case, (_, stage) in cases.items():
        for setting in every[1:]:
            runs = [folder / name / case / stage for name in (setting.name, every[0].name)]
            table[case][setting.name] = {key: relative(*(losses(run, (key,)) for run in runs)) for key in CURVES}
    return table


def exchange(folder: Path, pairs: list[tuple[Setting, Setting]], steps: int = STEPS) -> dict[str, dict]:
    """Load the checkpoint in the middle of `curves`' denoising runs into other settings.

    {"a to b": {"equal": bits after writing it again, "loss": largest relative difference of the second half from a's,
    "end_equal": bits at the end}}.
    """
    half, table = steps // 2, {}
    where = lambda a, b: folder / "exchange" / f"{a.name}-to-{b.name}"
    for n in sorted({b.processes for _, b in pairs}):
        jobs = []
        for a, b in (p for p in pairs if p[1].processes == n):
            source, out = folder / a.name / "denoise" / "pre", where(a, b)
            shutil.copytree(checkpoint.folder_of(source, half), checkpoint.folder_of(out / "pre", half))
            shutil.copy(source / "metrics.jsonl", out / "pre")
            place = {"recipe": "digits", "stage": "pre", "out": str(out), "parents": str(out)}
            job = place | {"overrides": [*b.overrides, *small("pre", steps)]}
            jobs += [{"do": "again", **job}, {"do": "train", **job}]
        launch(n, do(jobs), folder)
    files = lambda stage, step: checkpoint.verify(checkpoint.folder_of(stage, step)).manifest["files"]
    for a, b in pairs:
        source, out = folder / a.name / "denoise" / "pre", where(a, b)
        table[f"{a.name} to {b.name}"] = {
            "equal": files(source, half) == files(out / "again", half),
            "loss": relative(losses(out / "pre")[steps:], losses(source)[steps:]),
            "end_equal": files(source, steps) == files(out / "pre", steps),
        }
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--worlds", default="2,4", help="numbers of processes (default: 2,4)")
    parser.add_argument("--cases", default=",".join(CASES), help="what is trained")
    parser.add_argument("--exchange", action="store_true", help="load every setting's checkpoint into every other")
    parser.add_argument("--keep", type=Path, help="leave the runs here")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print both tables."""
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="zero-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401  once, before the forks
    import torch._dynamo  # noqa: F401

    every = settings([int(n) for n in arguments.worlds.split(",")])
    figures: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "model": SMALL}
    try:
        figures["curves"] = curves(folder, every, {k: CASES[k] for k in arguments.cases.split(",") if k})
        for case, row in figures["curves"].items():
            for key in CURVES:
                print(f"{case:>9} {key:>4}: " + "  ".join(f"{n} {e[key]:.1e}" for n, e in row.items()), flush=True)
        if arguments.exchange:
            short = folder / "short"
            short.mkdir()
            curves(short, every, {"denoise": CASES["denoise"]}, SHORT)
            figures["exchange"] = exchange(short, [(a, b) for a in every for b in every], SHORT)
            for name, row in figures["exchange"].items():
                print(f"{name:>18}: equal {row['equal']}  loss {row['loss']:.1e}  end equal {row['end_equal']}")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.out:
        about_run = results_file.about("cpu") | {"environment": machine.environment()}
        arguments.out.write_text(json.dumps(about_run | figures, indent=1) + "\n")
    return 0
