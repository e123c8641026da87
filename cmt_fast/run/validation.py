"""What each key allows by itself but not together."""

from __future__ import annotations

import math

import torch

from cmt_fast import models
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import (
    AUGMENTATIONS,
    DIFFUSION,
    STAGES,
    Drift,
    Run,
    weighs,
)
from cmt_fast.diffusion import sampling
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import table
from cmt_fast.objectives import OBJECTIVES, check_steps, taught
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.objectives.rules import Setting
from cmt_fast.run.resolved import ResolvedStage, resolve
from cmt_fast.teacher import solver_error


def check(run: Run, shape: tuple[int, ...], classes: int) -> None:
    """Raises ConfigError for what each key allows by itself but not together."""
    for name in run.stages:
        _check_stage(resolve(run, name), shape, classes)
    sampling.check(run.sampler, run.path, run.eval.steps)
    if run.eval.labels != "data" and not getattr(run.model, "conditional", True):
        raise ConfigError(
            f"eval.labels: {run.eval.labels!r}, and the network takes no labels (model.conditional false); valid is data"
        )


def _check_stage(resolved: ResolvedStage, shape: tuple[int, ...], classes: int) -> None:
    run, name, stage = resolved.run, resolved.name, resolved.config
    kinds = [("objective", stage.objective.kind)] + (
        [("anchor.objective", stage.anchor.objective.kind)] if stage.anchor else []
    )
    for key, kind in kinds:
        if not OBJECTIVES[kind].on(run.path):
            valid = ", ".join(
                k for k, row in OBJECTIVES.items() if row.on(run.path) and (key == "objective" or "cmt" in k)
            )
            raise ConfigError(
                f"{name}.{key}.kind: {kind!r} is for the path {OBJECTIVES[kind].path!r}, "
                f"this run's is {run.path!r}; valid are {valid}"
            )
    _check_networks(resolved)
    _check_perceptual(resolved, shape)
    if (stage.lr_schedule == "inverse_sqrt") != bool(stage.lr_knee_nimg):
        raise ConfigError(
            f"{name}.lr_knee_nimg: {stage.lr_knee_nimg} with lr_schedule {stage.lr_schedule!r}; "
            "inverse_sqrt needs the images at which it begins to fall, the others take none"
        )
    points = resolved.trajectory_rows
    if points and not stage.trajectories:
        raise ConfigError(
            f"{name}.trajectories: is missing, {' and '.join(k for _, k in kinds)} draw from the teacher's trajectories"
        )
    if ((points and not resolved.cache) or taught(stage.objective)) and not stage.teacher:
        raise ConfigError(f"{name}.teacher: is missing; it names the stage whose network is the teacher")
    own, anchored = resolved.rows
    if not own or (stage.anchor and not anchored):
        raise ConfigError(
            f"{name}.anchor.fraction: {stage.anchor and stage.anchor.fraction} leaves no row "
            f"of the batch of {stage.batch} to one side"
        )
    if getattr(stage.objective, "distance", "") == "features" and (not classes or len(shape) == 1):
        raise ConfigError(
            f"{name}.objective.distance: 'features' needs labelled images to train the feature network on"
        )
    if getattr(stage.objective, "uncertainty", False) and not weighs(run.model):
        raise ConfigError(
            f"{name}.objective.uncertainty: true needs a model of kind edm2 or model.log_variance true, "
            f"and this run's is a {run.model.kind} without"
        )
    _check_objective(resolved, classes)
    if stage.augment:
        _check_augment(resolved, shape)
    if stage.trajectories and points:
        _check_trajectories(resolved, shape, classes)


def _check_objective(resolved: ResolvedStage, classes: int) -> None:
    """The objective's own rules, and the numbers of steps that it is judged at."""
    run, stage = resolved.run, resolved.config
    o, spec = stage.objective, OBJECTIVES[stage.objective.kind]
    setting = Setting(
        resolved.name, resolved.rows[0], run.path, run.sampler.t_max, stage.label_dropout, classes,
        run.loader.kind,
    )  # fmt: skip
    spec.check(o, setting)
    check_steps(o, run.eval.steps)


def _check_augment(resolved: ResolvedStage, shape: tuple[int, ...]) -> None:
    """Images of a diffusion model, whose network is told of all that is done to them: without it would leak into samples."""
    run, key, stage, told = (
        resolved.run,
        f"{resolved.name}.augment",
        resolved.config,
        models.augment_labels(resolved.run.model),
    )
    assert stage.augment is not None
    if stage.objective.kind not in DIFFUSION:
        valid = " and ".join(DIFFUSION)
        raise ConfigError(
            f"{key}: is for a diffusion model's images, and {resolved.name} trains {stage.objective.kind!r}; "
            f"valid are stages of {valid}, set it to null here"
        )
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"{key}: needs images of 1 or 3 channels, the data has the shape {shape}; set it to null")
    if not stage.augment.kinds:
        raise ConfigError(
            f"{key}: every kind is 0; give one of {', '.join(AUGMENTATIONS)} a number above 0, or set it to null"
        )
    if told != stage.augment.labels:
        given = f"{stage.augment.labels} labels ({', '.join(stage.augment.kinds)})"
        can = (
            "take model.augment=" + str(stage.augment.labels)
            if run.model.kind == "edm"
            else "a model of kind edm can be told"
        )
        raise ConfigError(f"{key}: tells the network {given}, and this run's {run.model.kind} is told {told}; {can}")


def _check_trajectories(resolved: ResolvedStage, shape: tuple[int, ...], classes: int) -> None:
    """The solver's table exists and the batches are whole trajectories; `auto` has something to choose from."""
    name, t = resolved.name, resolved.trajectories
    if resolved.run.path == "ve" and t.pairs not in ("auto", "end"):
        raise ConfigError(
            f"{name}.trajectories.pairs: {t.pairs!r} on the path 've', whose networks are asked for the end; valid are auto, end"
        )
    if t.cache and t.nfe == "auto":
        raise ConfigError(
            f"{name}.trajectories.nfe: 'auto' is chosen with the teacher, cached trajectories have theirs"
        )
    if t.budget_forwards is not None:
        _check_budget(resolved, t.budget_forwards)
    try:
        table(ProbabilityPath(resolved.run.path), t.solver, t.calls, t.t_max, t.t_min, t.order, t.shift)
    except ConfigError as error:
        raise error.under(f"{name}.trajectories") from None
    if t.nfe != "auto":
        try:
            resolved.pool(None, shape, classes, torch.device("cpu"))
        except ConfigError as error:
            raise error.under(name) from None
    elif not resolved.candidates():
        raise ConfigError(
            f"{name}.trajectories.nfe: auto finds nothing to choose from; with {resolved.trajectory_rows} rows x "
            f"{t.pool_steps} steps in mode {t.mode} none of {', '.join(map(str, solver_error.NFE))} makes whole trajectories"
        )


def _check_budget(resolved: ResolvedStage, budget: int) -> None:
    """A budget is what `auto` chooses under, in a stage that trains on trajectories alone, and holds a step of it."""
    name, t = resolved.name, resolved.trajectories
    key = f"{name}.trajectories.budget_forwards"
    if t.nfe != "auto":
        raise ConfigError(
            f"{key}: {budget:,} is what `nfe: auto` chooses under, and nfe is {t.nfe}; set {name}.trajectories.nfe to auto, or "
            f"leave the budget out and give {name}.images_nimg"
        )
    if OBJECTIVES[resolved.config.objective.kind].draws != "trajectories":
        valid = [n for n, s in resolved.run.stages.items() if OBJECTIVES[s.objective.kind].draws == "trajectories"]
        raise ConfigError(
            f"{key}: {name} trains on {resolved.config.objective.kind}, its trajectories are an anchor's; a budget is of a stage "
            f"that trains on trajectories alone, here {' or '.join(valid) or 'none'}"
        )
    least = min((resolved.forwards(s.solver, n) for s, n in resolved.candidates()), default=0.0) * resolved.config.batch
    if budget < least:
        raise ConfigError(
            f"{key}: {budget:,} forwards hold no step; one takes {math.ceil(least):,} with the cheapest solver"
        )


def _check_networks(resolved: ResolvedStage) -> None:
    """The stages it names come before it, or are of another run; what guides has something to guide, once."""
    name, stage = resolved.name, resolved.config
    earlier = [s for s in STAGES[: resolved.index] if s != "control"]
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
    rollouts = guide.trajectories and resolved.trajectory_rows
    if not (taught(stage.objective) or rollouts):
        raise ConfigError(
            f"{name}.autoguidance: guides nothing here, {stage.objective.kind} takes no step of a teacher"
        )
    if stage.teacher_guidance != 1:
        raise ConfigError(f"{name}.teacher_guidance: {stage.teacher_guidance} beside autoguidance; only one may guide")
    if rollouts and stage.trajectories and stage.trajectories.guidance != 1:
        raise ConfigError(
            f"{name}.trajectories.guidance: {stage.trajectories.guidance} beside autoguidance.trajectories; only one may guide"
        )


def _check_perceptual(resolved: ResolvedStage, shape: tuple[int, ...]) -> None:
    """A distance of features has its network and images that fit it."""
    name, stage = resolved.name, resolved.config
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
        key = "space" if isinstance(stage.objective, Drift) else "distance"
        raise ConfigError(f"{name}.objective.{key}: {wanted[0]!r} needs images, the data has the shape {shape}")
    if wanted == ["lpips"] and (shape[0] not in (1, 3) or min(shape[1:]) < 16):
        fit = "images of 1 or 3 channels and 16 pixels or more"
        raise ConfigError(f"{name}.objective.distance: 'lpips' needs {fit}, the data has the shape {shape}")
