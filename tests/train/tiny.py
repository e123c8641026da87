"""A run of a few seconds over the real data: what the tests train."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cmt_fast import checkpoint, config, loop
from cmt_fast.engine import LocalEngine
from cmt_fast.schema import Run, Stage
from cmt_fast.source import Source
from cmt_fast.workspace import Workspace
from tests import forked

SMALL = [
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "eval.n=200",
    "eval.n_during=100",
    "pre.images_nimg=640",
    "pre.batch=32",
    "pre.warmup_nimg=64",
    "mid.images_nimg=640",
    "mid.batch=32",
    "mid.trajectories.pool_steps=4",
    "mid.warmup_nimg=0",
    "post.images_nimg=640",
    "post.batch=32",
    "post.trajectories.pool_steps=4",
    "control.images_nimg=1280",
    "control.batch=32",
]
NO_EVAL = [f"{s}.eval_every_nimg=null" for s in ("mid", "post", "control")]


def tiny(recipe: str = "digits", *more: str) -> Run:
    """The recipe with a network of a few thousand parameters and a few dozen steps a stage."""
    return config.load(recipe, [*SMALL, *NO_EVAL, *more])


def cmt(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command, environment = [*forked.python(), "-m", "cmt_fast", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> list[dict]:
    """The rows of a stage without what differs between equal runs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall"} for row in rows]


def source_of(work: Workspace, name: str, stage: Stage | None = None) -> Source:
    """Rows and loss of a stage (the run's own, unless another is given), under a local engine."""
    stage = stage or work.run.stage(name)
    return Source(work, name, stage, LocalEngine(work.build(), stage, work.device))


def stop_after_a_checkpoint(work: Workspace) -> None:
    """Train until the second checkpoint would be written."""
    whole, written = checkpoint.save, []

    def save(*arguments, **more):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return whole(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            loop.train(work, ["mid"])
