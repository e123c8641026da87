"""A stage in optimizer steps: how long, when it is looked at, its learning rate."""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.config.schema import Stage


class Since(NamedTuple):
    """Where the settings of a stage that has begun were changed: after `step` steps of `nimg` images, of which `rows` were rows
    of its objective. log_every: of the stage as it began, which stays: a row of metrics may be half done there.
    """

    step: int
    nimg: int
    rows: int
    log_every: int


class Schedule(NamedTuple):
    """A stage in optimizer steps; `*_every` 0 means never. since: of the last change of its settings, None without one."""

    total: int
    batch: int
    warmup: int
    log_every: int
    checkpoint_every: int
    snapshot_every: int
    eval_every: int
    grid_every: int
    since: Since | None = None

    def nimg(self, n: int) -> int:
        """Images after n steps; before a change of the batch by the settings of today."""
        s = self.since
        return n * self.batch if s is None or n < s.step else s.nimg + (n - s.step) * self.batch

    def progress(self, n: int) -> float:
        """The share of the stage that n steps are, in images."""
        return self.nimg(n) / self.nimg(self.total)

    def rows_before(self, n: int, own: int) -> int:
        """Rows of the objective in the first n steps, `own` in each of today's."""
        s = self.since
        return n * own if s is None else s.rows + (n - s.step) * own

    def evaluates(self, n: int, last: bool) -> bool:
        """Whether the network is judged after step n."""
        return bool(self.eval_every) and (n % self.eval_every == 0 or last)

    def draws(self, n: int, last: bool) -> bool:
        """Whether a grid of samples is drawn after step n."""
        return last or bool(self.grid_every and n % self.grid_every == 0)

    def keeps(self, n: int, last: bool) -> bool:
        """Whether the EMA is kept as a snapshot after step n."""
        return bool(self.snapshot_every) and (n % self.snapshot_every == 0 or last)

    def lr(self, stage: Stage, step: int) -> float:
        """Learning rate of step `step`, from 0: linear warm-up times the stage's schedule."""
        nimg = self.nimg(step)  # (s b) / (t b) and s / t are the same number
        scale = min(1.0, (nimg + self.batch) / (self.warmup * self.batch)) if self.warmup else 1.0
        if stage.lr_schedule == "linear":
            scale *= 1 - self.progress(step)
        elif stage.lr_schedule == "inverse_sqrt":
            scale /= max(nimg / stage.lr_knee_nimg, 1.0) ** 0.5
        return stage.lr * scale


def schedule(stage: Stage, since: Since | None = None) -> Schedule:
    """Lengths in steps, rounded up; checkpoints fall on log rows, so a restart repeats whole rows.

    since: where the stage was given these settings while it was under way; its length counts from its own beginning.
    """
    total = -(-stage.images_nimg // stage.batch)
    log_every = max(1, min(total // 50, 50))  # a stop waits for a row, so rows are never far apart
    if since:
        total = since.step + max(0, -(-(stage.images_nimg - since.nimg) // stage.batch))
        log_every = since.log_every
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
        since,
    )
