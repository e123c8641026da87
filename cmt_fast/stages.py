"""A stage is a row of data: this page says which rows make sense, and how long each is in steps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cmt_fast import sample, tuning
from cmt_fast.config import ConfigError, nearest
from cmt_fast.objectives import ROWS
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.paths import Path
from cmt_fast.schema import STAGES, Run, Stage, Trajectories
from cmt_fast.solvers import table
from cmt_fast.trajectories import Pool

INDEX = {name: i for i, name in enumerate(STAGES)}  # enters every random key: never renumber


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


def rows(stage: Stage) -> tuple[int, int]:
    """Rows of a batch on the stage's own objective, and on its anchor."""
    anchored = round(stage.anchor.share * stage.batch) if stage.anchor else 0
    return stage.batch - anchored, anchored


def passes(run: Run, name: str, processes: int) -> int:
    """Forwards and backwards of each process in one step. Raises ConfigError where rows do not divide evenly.

    Every pass of every process takes rows of each kind in the whole batch's proportion: only then is the mean over
    passes and processes the mean over the batch.
    """
    stage = run.stage(name)
    assert stage is not None
    if stage.batch % processes:
        raise ConfigError(f"{name}.batch: {stage.batch} does not divide over {processes} processes")
    each = stage.batch // processes
    micro = stage.micro_batch or each
    if micro < each and each % micro:
        raise ConfigError(f"{name}.micro_batch: {micro} does not divide a process's {each} rows a step")
    count = max(1, each // micro)
    shards = processes * count
    own, anchored = rows(stage)
    where = f"over {count} passes of {processes} processes"
    if own % shards or anchored % shards:
        raise ConfigError(
            f"{name}.anchor.share: {own} rows of the objective and {anchored} of the anchor do not divide {where}"
        )
    ratio = getattr(stage.objective, "ratio", None)
    if ratio is not None and round(ratio * (own // shards)) * shards != round(ratio * own):
        with_tangents = f"{ratio} of {own} rows are {round(ratio * own)} rows with tangents"
        raise ConfigError(f"{name}.objective.ratio: {with_tangents}, which do not divide {where}")
    return count


def trajectory_rows(stage: Stage) -> int:
    """Rows of a batch that are points of teacher trajectories."""
    own, anchored = rows(stage)
    return anchored + (own if ROWS[stage.objective.kind].draws == "trajectories" else 0)


def cached(stage: Stage) -> str | None:
    """The folder that a stage's trajectories come from, None where it rolls them out or has none."""
    return stage.trajectories.cache if stage.trajectories and trajectory_rows(stage) else None


def called(stage: Stage) -> dict[str, str]:
    """As `Stage.networks`, without those that only cached trajectories were made by: what must be at hand."""
    steps = ROWS[stage.objective.kind].teacher or not cached(stage)
    return {key: name for key, name in stage.networks().items() if key == "start" or steps}


def names(run: Run) -> list[str]:
    """The stages a run has, in order."""
    return [name for name in STAGES if run.stage(name) is not None]


def check(run: Run, shape: tuple[int, ...], classes: int) -> None:
    """Raises ConfigError for what each key allows by itself but not together."""
    for name in names(run):
        stage = run.stage(name)
        assert stage is not None
        _check_stage(run, name, stage, shape, classes)
    _as_config_error("sampler", lambda: sample.check(run.sampler, run.path, run.eval.steps))


def _check_stage(run: Run, name: str, stage: Stage, shape: tuple[int, ...], classes: int) -> None:
    needs = ROWS[stage.objective.kind]
    kinds = [("objective", stage.objective.kind)] + (
        [("anchor.objective", stage.anchor.objective.kind)] if stage.anchor else []
    )
    for key, kind in kinds:
        if ROWS[kind].path != run.path:
            valid = ", ".join(
                k for k, row in ROWS.items() if row.path == run.path and (key == "objective" or "cmt" in k)
            )
            raise ConfigError(
                f"{name}.{key}.kind: {kind!r} is for the path {ROWS[kind].path!r}, this run's is {run.path!r}; valid are {valid}"
            )
    _check_networks(name, stage)
    _check_perceptual(name, stage, shape)
    if (stage.lr_schedule == "inverse_sqrt") != bool(stage.lr_knee_nimg):
        raise ConfigError(
            f"{name}.lr_knee_nimg: {stage.lr_knee_nimg} with lr_schedule {stage.lr_schedule!r}; "
            "inverse_sqrt needs the images at which it begins to fall, the others take none"
        )
    if stage.label_dropout and (needs.draws == "trajectories" or stage.objective.kind in ("ecd", "scd")):
        raise ConfigError(
            f"{name}.label_dropout: {stage.label_dropout} with {stage.objective.kind}, whose target the teacher makes with labels"
        )
    points = trajectory_rows(stage)
    if points and not stage.trajectories:
        raise ConfigError(
            f"{name}.trajectories: is missing, {' and '.join(k for _, k in kinds)} draw from the teacher's trajectories"
        )
    if ((points and not cached(stage)) or needs.teacher) and not stage.teacher:
        raise ConfigError(f"{name}.teacher: is missing; it names the stage whose network is the teacher")
    if not rows(stage)[0] or (stage.anchor and not rows(stage)[1]):
        raise ConfigError(
            f"{name}.anchor.share: {stage.anchor and stage.anchor.share} leaves no row of the batch of {stage.batch} to one side"
        )
    if (
        stage.label_dropout or stage.teacher_guidance != 1 or (stage.trajectories and stage.trajectories.guidance != 1)
    ) and not classes:
        raise ConfigError(f"{name}: label_dropout and guidance need class labels, and this data has none")
    if getattr(stage.objective, "distance", "") == "features" and (not classes or len(shape) == 1):
        raise ConfigError(
            f"{name}.objective.distance: 'features' needs labelled images to train the feature network on"
        )
    if getattr(stage.objective, "uncertainty", False) and run.model.kind != "edm2":
        raise ConfigError(
            f"{name}.objective.uncertainty: needs a model of kind edm2, and this run's is {run.model.kind}"
        )
    if stage.trajectories and points:
        t = stage.trajectories
        if t.cache and t.nfe == "auto":
            raise ConfigError(
                f"{name}.trajectories.nfe: 'auto' is chosen with the teacher, cached trajectories have theirs"
            )
        _as_config_error(
            f"{name}.trajectories", lambda: table(Path(run.path), t.solver, t.calls, t.t_max, t.t_min, t.order, t.shift)
        )
        if t.nfe != "auto":
            _as_config_error(name, lambda: pool(run, name, t, None, shape, classes, "cpu"))
        elif not candidates(run, name):
            raise ConfigError(
                f"{name}.trajectories.nfe: auto finds nothing to choose from; with {points} rows x {t.pool_steps} steps in "
                f"mode {t.mode} none of {', '.join(map(str, tuning.NFE))} makes whole trajectories"
            )


def _check_networks(name: str, stage: Stage) -> None:
    """The stages it names come before it, or are of another run; what guides has something to guide, once."""
    earlier = [s for s in STAGES[: INDEX[name]] if s != "control"]
    for key, parent in stage.networks().items():
        valid, last = earlier, parent
        if "/" in parent and key != "start":
            valid, last = list(STAGES), parent.rpartition("/")[2]
        if last in valid:
            continue
        hint = nearest(last, valid)
        if "/" in parent and key != "start":
            raise ConfigError(f"{name}.{key}: {parent!r} does not end in a stage; valid are {', '.join(valid)}{hint}")
        wrong = f"does not come before {name}" if parent in STAGES else "is no stage"
        other = "" if key == "start" else "; of another run RUN/STAGE"
        raise ConfigError(f"{name}.{key}: {parent!r} {wrong}; valid are {', '.join(valid) or 'none'}{other}{hint}")
    guide = stage.autoguidance
    if guide is None:
        return
    rollouts = guide.trajectories and trajectory_rows(stage)
    if not (ROWS[stage.objective.kind].teacher or rollouts):
        raise ConfigError(
            f"{name}.autoguidance: guides nothing here, {stage.objective.kind} takes no step of a teacher"
        )
    if stage.teacher_guidance != 1:
        raise ConfigError(f"{name}.teacher_guidance: {stage.teacher_guidance} beside autoguidance; only one may guide")
    if rollouts and stage.trajectories and stage.trajectories.guidance != 1:
        raise ConfigError(
            f"{name}.trajectories.guidance: {stage.trajectories.guidance} beside autoguidance.trajectories; only one may guide"
        )


def _check_perceptual(name: str, stage: Stage, shape: tuple[int, ...]) -> None:
    """A distance of features has its network and images that fit it."""
    wanted = sorted(stage.distances() & set(PERCEPTUAL))
    if not wanted and stage.perceptual:
        raise ConfigError(
            f"{name}.perceptual: no distance of this stage reads it; those that do are {', '.join(PERCEPTUAL)}"
        )
    if len(wanted) > 1:
        raise ConfigError(
            f"{name}.anchor.objective.distance: {' and '.join(wanted)} in one stage; there is one network"
        )
    if wanted and not stage.perceptual:
        raise ConfigError(
            f"{name}.perceptual.weights: is missing, the distance {wanted[0]!r} reads its network from there"
        )
    if not wanted:
        return
    if len(shape) != 3:
        raise ConfigError(f"{name}.objective.distance: {wanted[0]!r} needs images, the data has the shape {shape}")
    if wanted == ["lpips"] and (shape[0] not in (1, 3) or min(shape[1:]) < 16):
        fit = "images of 1 or 3 channels and 16 pixels or more"
        raise ConfigError(f"{name}.objective.distance: 'lpips' needs {fit}, the data has the shape {shape}")


def pool(
    run: Run, name: str, how: Trajectories, teacher, shape: tuple[int, ...], classes: int, device, **options
) -> Pool:
    """The trajectories of a stage, rolled out as `how` says; options: as of Pool.

    Raises ValueError where batch and trajectories do not divide.
    """
    stage = run.stage(name)
    assert stage is not None
    path, rows = Path(run.path, run.sigma_data), trajectory_rows(stage)
    return Pool(teacher, path, how, shape, classes, rows, run.seed, INDEX[name], device, **options)


def candidates(
    run: Run, name: str, nfes: tuple[int, ...] = tuning.NFE, grids: bool = False
) -> list[tuple[tuning.Solver, int]]:
    """The solvers, each with a number of network calls, whose trajectories fill this stage's batches on these processes."""
    stage, found = run.stage(name), []
    assert stage is not None and stage.trajectories is not None
    for nfe in nfes:
        for setting in tuning.settings(run.path, stage.trajectories, grids):
            how = tuning.apply(stage.trajectories, setting, nfe)
            try:
                pool(run, name, how, None, (1,), 0, torch.device("cpu"))
            except ValueError:
                continue
            found.append((setting, nfe))
    return found


def _as_config_error(key: str, call) -> None:
    try:
        call()
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(
            text if text.startswith(key) else f"{key}.{text}" if ":" in text.split(" ")[0] else f"{key}: {text}"
        ) from None
