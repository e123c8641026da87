"""`cmt trajectories`: the teacher's trajectories of a stage onto disk, for students that train without the teacher."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from cmt_fast.cli.parser import add_overrides, checked
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES
from cmt_fast.data import trajectory_store
from cmt_fast.data.latents import Index
from cmt_fast.data.writing import ROWS
from cmt_fast.run import folder, workspace
from cmt_fast.run.resolved import resolve
from cmt_fast.runtime import distributed, machine, progress
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
    except KeyboardInterrupt:
        if distributed.rank() == 0:
            print("cmt: stopped; rerun the same command to resume from the last whole shard", file=sys.stderr)
        raise SystemExit(130) from None
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
    """Write a stage's trajectories into OUT; the index on rank 0. Raises ConfigError for a teacher that cannot be had."""
    run, resolved = work.run, work.stage(name)
    stage = resolved.config
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
        roll = roller(
            teacher.net(format), work.path, stage.trajectories, prior, work.device, min(shard_rows, n),
            teacher.computing(format),
        )  # fmt: skip
        names = getattr(work.data, "class_names", ()) or tuple(str(k) for k in range(work.data.classes))
        with progress.counting("trajectories", -(-n // distributed.size()), work.folder) as advance:
            origin = trajectory_store.Origin(f"{run.name}, {stage.teacher}", names)
            return trajectory_store.write(out, n, rolled, origin, dtype, shard_rows, roll, advance)
    finally:
        machine.allow_tf32(False)
