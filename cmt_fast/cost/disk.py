"""What a run puts on disk, and what judging it takes: bytes and network calls, by arithmetic on the recipe's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cmt_fast.config.schema import PowerEma, Run
from cmt_fast.cost.memory import trajectories
from cmt_fast.data.trajectory_store import DTYPES
from cmt_fast.engine.sharding import gb
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.storage import checkpoint as checkpoints_
from cmt_fast.storage import files, pruning

CHECKPOINTS = 3  # the last two, and the one that is being written
ITEM = {"float16": 2, "float32": 4}
BESIDE = 16  # bytes of a row beside its nodes: its label and its checksum
FEATURES = {"fid": 2048, "fd_dinov2": 1024}  # numbers of a sample that a judge keeps


class Cache(NamedTuple):
    """A store of all the trajectories that a stage draws from, none of them twice."""

    trajectories: int
    row_bytes: int
    bytes: int


class Judging(NamedTuple):
    """Of one stage's evaluations: samples, forwards of the student, and bytes of features that a process keeps of one."""

    samples: int
    forwards: int
    features_bytes: int


def cache(resolved: ResolvedStage, shape: tuple[int, ...], dtype: str = "fp16") -> Cache | None:
    """The store that a stage would read in the place of its teacher; None for a stage without trajectories."""
    if not resolved.trajectory_rows:
        return None
    count, nodes = trajectories(resolved)
    rounds = -(
        -resolved.schedule.total // (1 if resolved.trajectories.mode == "paper" else resolved.trajectories.pool_steps)
    )
    row = row_bytes(nodes, shape, dtype)
    return Cache(count * rounds, row, count * rounds * row)


def row_bytes(nodes: int, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a stored trajectory."""
    return nodes * math.prod(shape) * ITEM[DTYPES[dtype]] + BESIDE


def checkpoints(resolved: ResolvedStage, parameters: int) -> int:
    """Of weights, moments and tracks in fp32, and of the snapshots of power-function averages."""
    return CHECKPOINTS * checkpoint(resolved, parameters) + snapshots(resolved, parameters)


def checkpoint(resolved: ResolvedStage, parameters: int) -> int:
    """One of them."""
    return parameters * (12 + 4 * len(resolved.config.ema))


def snapshots(resolved: ResolvedStage, parameters: int) -> int:
    """Of power-function averages, all of a stage's."""
    stage, plan = resolved.config, resolved.schedule
    profiles = sum(isinstance(e, PowerEma) for e in stage.ema)
    kept = plan.total // plan.snapshot_every if plan.snapshot_every else 0
    return 4 * parameters * kept * profiles


def saves(resolved: ResolvedStage, step: int = 0) -> int:
    """Checkpoints that a stage writes after so many steps, by images, those before its looks and its last one too: up to
    CHECKPOINTS of them, as no more are there at once."""
    plan = resolved.schedule
    every = [k for k in (plan.checkpoint_every, plan.eval_every, plan.grid_every) if k]
    due = {n for k in every for n in range(step - step % k + k, plan.total, k)[:CHECKPOINTS]}
    return min(CHECKPOINTS, len({*due, plan.total}))


def needs(stages: Sequence[ResolvedStage], parameters: int) -> list[int]:
    """Bytes that must be free for each stage to end when those before it have. What is on disk of them already counts, but
    for a checkpoint more, which is whole before an old one goes."""
    out, before = [], 0
    for stage in stages:
        one, most = checkpoint(stage, parameters), checkpoints(stage, parameters)
        there = sum(pruning.size(stage.folder / name) for name in ("checkpoints", "snapshots"))
        to_come = saves(stage, max(_steps(stage), default=0))
        most = min(most, there + to_come * one + snapshots(stage, parameters))  # a short stage never has as many
        out.append(before + max(one, most - there))
        before += max(0, most - (to_come == CHECKPOINTS) * one - there)
    return out


def _steps(stage: ResolvedStage) -> list[int]:
    """Of its checkpoints; none where they cannot be listed, which who reads them says."""
    try:
        return checkpoints_.steps(stage.folder)
    except checkpoints_.CheckpointError:
        return []


def check(stages: Sequence[ResolvedStage], parameters: int, folder: Path) -> str | None:
    """Before the first step. Raises DiskFull where what the first stage writes does not fit; returns a line where only a later
    one's does not."""
    room, needed = files.free(folder), needs(stages, parameters)
    if room is None or not needed or max(needed) <= room:
        return None
    if needed[0] > room:
        raise files.DiskFull(f"{folder}, checkpoints of {stages[0].name}", needed[0], room)
    late = next(i for i, count in enumerate(needed) if count > room)
    return f"{folder} has {gb(room)} free, and up to the end of {stages[late].name} checkpoints take {gb(needed[late])} more"


def line(resolved: ResolvedStage, shape: tuple[int, ...], parameters: int, folder: Path | None = None) -> str:
    """What a stage writes, and what a cache of its trajectories would be; folder: on whose disk, whose free space is named."""
    text = f"disk: {CHECKPOINTS} checkpoints {gb(checkpoints(resolved, parameters))}"
    stored = None if resolved.cache else cache(resolved, shape)
    if stored:
        rows, each = stored.trajectories, f"{stored.row_bytes:,} bytes"
        text += f"; `cmt trajectories -n {rows}` would write {gb(stored.bytes)} in fp16, {rows:,} x {each}"
    room = files.free(folder) if folder else None
    return text if room is None else f"{text}; {gb(room)} free there"


def judging(resolved: ResolvedStage) -> Judging:
    """Of a stage's evaluations while it trains; none where `eval_every_nimg` is not set."""
    plan = resolved.schedule
    times = -(-plan.total // plan.eval_every) if plan.eval_every else 0
    return _judging(resolved.run, times, resolved.run.eval.n_during)


def final(run: Run) -> Judging:
    """Of `cmt eval` of one stage, as the recipe has it: `eval.n` samples at each number of steps."""
    return _judging(run, 1, run.eval.n)


def _judging(run: Run, times: int, n: int) -> Judging:
    samples = times * n * len(run.eval.steps)
    return Judging(samples, times * n * sum(run.eval.steps), 4 * n * FEATURES.get(run.eval.metric, 0) * bool(times))
