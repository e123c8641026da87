"""`cmt trajectories`: the teacher's trajectories of a stage onto disk, for students that train without the teacher."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path

import torch

from cmt_fast.cli.parser import add_overrides, checked
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES, Trajectories
from cmt_fast.cost import disk, memory
from cmt_fast.data import trajectory_store
from cmt_fast.data.latents import Index
from cmt_fast.data.writing import ROWS
from cmt_fast.engine.sharding import gb, memory_bytes
from cmt_fast.run import folder, workspace
from cmt_fast.run.resolved import ResolvedStage, resolve
from cmt_fast.runtime import distributed, machine, progress, signals
from cmt_fast.storage import files
from cmt_fast.teacher.pool import Prior, roller
from cmt_fast.teacher.precision import Teacher


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=write)
    p.add_argument("recipe", help="name or YAML file")
    add_overrides(p)
    p.add_argument(
        "--stage", choices=STAGES, default="mid", help="stage that will train on the trajectories (default: mid)"
    )
    p.add_argument("--from", dest="run", type=Path, metavar="RUN", help="where the teacher is (default: runs/NAME)")
    p.add_argument("--cache", type=Path, required=True, metavar="DIR", help="the store, a new folder")
    p.add_argument(
        "-n",
        "--count",
        "--n",
        dest="n",
        type=int,
        required=True,
        help="number of trajectories",
    )
    p.add_argument(
        "--dtype", choices=tuple(trajectory_store.DTYPES), default="fp16", help="of the store (default: fp16)"
    )
    p.add_argument("--shard-rows", type=int, default=ROWS, help=f"rows in a file (default: {ROWS:,})")


def write(args: argparse.Namespace) -> None:
    for name in ("n", "shard_rows"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not at least 1")
    run = loading.load(args.recipe, args.overrides)
    if args.stage not in run.stages or not resolve(run, args.stage).trajectory_rows:
        raise ConfigError(f"--stage: {args.stage} of {run.name} draws from no trajectories")
    if run.stages[args.stage].trajectories.nfe == "auto":
        raise ConfigError(f"{args.stage}.trajectories.nfe: 'auto' is chosen when a stage begins; name a number here")
    distributed.start(machine.device(run.device), run.timeout_s)
    work = workspace.Workspace(run, args.run or folder.default(run))
    try:
        index = checked(lambda: make(work, args.stage, args.cache, args.n, args.dtype, args.shard_rows))
    except KeyboardInterrupt as error:
        if distributed.rank() == 0:
            print("cmt: stopped; rerun the same command to resume from the last whole shard", file=sys.stderr)
        raise SystemExit(signals.code_of(error)) from None
    if index:
        size = index.rows * index.stride
        r = index.trajectories
        print(
            f"{args.cache}: {index.rows:,} trajectories of {len(r.times)} nodes, {r.solver}, teacher in {r.precision}, "
            f"{index.dtype}, {len(index.shards)} shards, {size / 1e6:,.1f} MB"
        )


def make(
    work: workspace.Workspace, name: str, out: Path, n: int, dtype: str = "fp16", shard_rows: int = ROWS
) -> Index | None:
    """Write a stage's trajectories into OUT; the index on rank 0.

    Raises ConfigError for a teacher that cannot be had, and for a store that is larger than the disk's free space.
    """
    run, resolved = work.run, work.stage(name)
    stage = resolved.config
    if resolved.trajectories.omega_max != 1:
        raise ConfigError(
            f"{name}.trajectories.omega_max: {resolved.trajectories.omega_max} draws a scale a trajectory, and a store "
            "keeps none; write those of one scale (omega_max 1, guidance), or roll out as the stage trains"
        )
    distributed.agreed(lambda: _room(out, n, resolved, work.data.shape, dtype), ConfigError, f"{out}: has no room")
    teacher_of = work.identity(stage)
    teacher = Teacher(name, stage, functools.cache(work.network), work.path, work.device)
    machine.allow_tf32(stage.precision == "tf32")
    try:
        about = teacher.choose(run.seed, resolved.index, work.data.shape, work.drawn)
        if distributed.rank() == 0:
            for line in teacher.lines(about):
                progress.say(f"{name:>8} {line}")
        facts = work.trajectories(stage)
        spread = run.sigma_data if dtype == "fp16" and run.path == "ve" else 0.0
        rolled = trajectory_store.Rolled(
            shape=work.data.shape, times=facts["times"], spread=spread, path=facts["path"], teacher=teacher_of,
            solver=facts["solver"], solver_xxh3_128=facts["solver_xxh3_128"], guidance=facts["guidance"],
            label_dropout=facts["label_dropout"], precision=about["precision"], seed=run.seed, drawn=facts["drawn"],
        )  # fmt: skip
        format = about["precision"]
        prior = Prior(work.data.shape, work.drawn, run.seed, resolved.index, stage.trajectory_dropout)
        net = teacher.net(format)
        how = _bounded(work, resolved, min(shard_rows, n), format)
        roll = roller(net, work.path, how, prior, work.device, min(shard_rows, n), teacher.computing(format))
        names = getattr(work.data, "class_names", ()) or tuple(str(k) for k in range(work.data.classes))
        with progress.counting("trajectories", -(-n // distributed.size()), work.folder) as advance:
            origin = trajectory_store.Origin(f"{run.name}, {stage.teacher}", names)
            return trajectory_store.write(out, n, rolled, origin, dtype, shard_rows, roll, advance)
    finally:
        machine.allow_tf32(False)


def _room(out: Path, n: int, resolved: ResolvedStage, shape: tuple[int, ...], dtype: str) -> None:
    """Say how large the store will be, before anything is rolled out. Raises ConfigError where the disk has less free."""
    if distributed.rank():
        return
    nodes = memory.trajectories(resolved)[1]
    row, part = disk.row_bytes(nodes, shape, dtype), out.with_name(f"{out.name}.part")
    there = sum(f.stat().st_size for f in part.glob("*.bin")) if part.is_dir() else 0
    free, size = files.free(out.parent), n * row
    about = f"{n:,} trajectories of {nodes} nodes in {dtype} are {gb(size)} ({row:,} bytes each)"
    done = f", {gb(there)} of them are written" if there else ""
    if free is not None and size - there > free:
        fewer = "fewer trajectories (-n) or another disk (--cache)" + ", or --dtype fp16" * (dtype == "fp32")
        raise ConfigError(f"--cache: {about}{done}, and {os.path.abspath(out.parent)} has {gb(free)} free; {fewer}")
    room = "" if free is None else f"; {gb(free)} are free"
    progress.say(f"{resolved.name:>8} disk: {about}{done}{room}")


def _bounded(work: workspace.Workspace, resolved: ResolvedStage, rows: int, precision: str) -> Trajectories:
    """How a stage's trajectories are rolled out, no more at once than this device has memory for.

    Each row is integrated by itself: how many go at once changes no trajectory, but for the rounding of other batches.
    """
    t, stage = resolved.trajectories, resolved.config
    guide = stage.autoguidance
    names = [stage.teacher, guide.network if guide and guide.trajectories else None]
    models = [folder.stored_run(work.other(name)).model if "/" in name else work.run.model for name in names if name]
    shape, classes = tuple(work.data.shape), work.data.classes
    each = memory.rollout_bytes(models, resolved, shape, classes, precision in ("bf16", "fp8"))
    buffer = 4 * rows * memory.trajectories(resolved)[1] * math.prod(shape)
    fit = memory.rows_that_fit(free_bytes(work.device) - buffer, each)
    if fit >= min(t.rollout_batch, rows):
        return t
    if distributed.rank() == 0:
        counted = f"{gb(int(each))} each by count, beside {gb(int(buffer))} of nodes"
        progress.say(f"{resolved.name:>8} rollouts: {fit:,} at once, not {min(t.rollout_batch, rows):,}: {counted}")
    return dataclasses.replace(t, rollout_batch=fit)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on its device."""
    if device.type != "cuda":
        return memory_bytes(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
