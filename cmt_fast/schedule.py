"""A stage in optimizer steps: how long, when it is looked at, its learning rate."""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.config.schema import Stage


class Schedule(NamedTuple):
    """A stage in optimizer steps; `*_every` 0 means never."""

    total: int
    batch: int
    warmup: int
    log_every: int
    checkpoint_every: int
    snapshot_every: int
    eval_every: int
    grid_every: int

    def lr(self, stage: Stage, step: int) -> float:
        """Learning rate of step `step`, from 0: linear warm-up times the stage's schedule."""
        scale = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if stage.lr_schedule == "linear":
            scale *= 1 - step / self.total
        elif stage.lr_schedule == "inverse_sqrt":
            scale /= max(step * self.batch / stage.lr_knee_nimg, 1.0) ** 0.5
        return stage.lr * scale


def schedule(stage: Stage) -> Schedule:
    """Lengths in steps, rounded up; checkpoints fall on log rows, so a restart repeats whole rows."""
    total = -(-stage.images_nimg // stage.batch)
    log_every = max(1, min(total // 50, 50))  # a stop waits for a row, so rows are never far apart
    steps = lambda nimg: -(-nimg // stage.batch)
    every = lambda nimg: log_every * max(1, round(steps(nimg) / log_every)) if nimg else 0
    return Schedule(
        total,
        stage.batch,
        steps(stage.warmup_nimg),
        log_every,
        every(stage.checkpoint_every_nimg) or log_every * max(1, total // (4 * log_every)),
        every(stage.snapshot_every_nimg),
        every(stage.eval_every_nimg),
        every(stage.grid_every_nimg),
    )
