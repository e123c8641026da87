"""A track: what every attempt has in common, as a YAML file of the package, and whether a recipe keeps to it.

Data, network, judge, number of steps and target are fixed; how the network gets there is free. The network is fixed because
the currency is its forwards: were it free, the largest network that needs the fewest calls would win, and a forward would mean
another thing in every record. Everything that is trained on the way counts from random weights, teachers too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import DIFFUSION, Run, Stage
from cmt_fast.cost import flops
from cmt_fast.run.resolved import resolve
from cmt_fast.schedule import Schedule

FOLDER = Path(__file__).with_name("tracks")
FREE = "free are stages, objectives, path, schedules, optimizer, EMA, teacher and precision"


class Track(NamedTuple):
    """What tracks/NAME.yaml says. target: distance in the first space and, as a guard, in the second; judge: samples, their
    seed, batch, and the names of both feature spaces; seeds: the first, and the least number; p: of the t test."""

    name: str
    title: str
    begin: str
    data: dict[str, Any]
    model: dict[str, Any]
    steps: int
    target: dict[str, float]
    judge: dict[str, Any]
    seeds: dict[str, int]
    p: float
    look_every_nimg: int


def names() -> list[str]:
    """The tracks that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@functools.cache
def load(name: str) -> Track:
    """A track by its name. Raises ConfigError for one that is not there."""
    file = FOLDER / f"{name}.yaml"
    if name not in names():
        raise ConfigError(f"TRACK: {name!r} is no track; valid are {', '.join(names())}{nearest(name, names())}")
    return Track(name, **loading.parse_yaml(file.read_text("utf-8"), str(file)))


def entered(track: Track, recipe: str | None, overrides: list[str] | tuple[str, ...], final: str) -> Run:
    """The run that an attempt trains, judged as the track judges, without stages that the final one does not need.

    recipe: a YAML file or a name (default: the track's). Raises ConfigError where it does not keep to the track, as `check`.
    """
    run = loading.load(recipe or track.begin, overrides)
    check(track, run, final)
    control = run.control if final == "control" else None
    # seeds are the attempt's; nothing is looked at on the way, no logger is told
    return dataclasses.replace(
        cast(Any, run), control=control, seed=track.seeds["from"], eval=judged(track, run), loggers=(), tensorboard=False,
        **{name: _unseen(stage) for name, stage in run.stages.items() if name != "control"},
    )  # fmt: skip


def _unseen(stage: Stage) -> Stage:
    return dataclasses.replace(cast(Any, stage), eval_every_nimg=None, grid_every_nimg=None, snapshot_every_nimg=None)


def judged(track: Track, run: Run) -> Any:
    """The track's `eval`, whatever the recipe says."""
    own = {key: track.judge[key] for key in ("n", "seed", "batch")}
    fixed = {"metric": "frechet", "reference": None, "weights": None, "labels": "data", "on_error": "stop"}
    return dataclasses.replace(cast(Any, run.eval), steps=(track.steps,), n_during=own["n"], **own, **fixed)


def lineage(run: Run, final: str) -> list[str]:
    """The stages that an attempt trains, in order."""
    return [*run.ancestors(final), final]


def check(track: Track, run: Run, final: str) -> None:
    """Raises ConfigError naming the key by which a recipe breaks the rules of its track."""
    if final not in run.stages:
        raise ConfigError(f"--final: {final!r} is no stage of this recipe; it has {', '.join(run.stages)}")
    if run.stages[final].objective.kind in DIFFUSION:
        raise ConfigError(
            f"--final: {final} trains a diffusion model, and {track.steps} step is judged; train a few-step stage"
        )
    tree, like = loading.dump(run), loading.dump(_like(track.begin))
    for key in ("data", "model"):
        for name in sorted({*tree[key], *like[key]}):
            if tree[key].get(name) != like[key].get(name):
                fixed = f"{key}.{name}: {tree[key].get(name)!r}, and the track {track.name} has {like[key].get(name)!r}"
                raise ConfigError(f"{fixed}; {key} is fixed, {FREE}")
    if run.engine != "local":
        raise ConfigError(f"engine: {run.engine!r} is not measured here; an attempt is one process, engine=local")
    for name in lineage(run, final):
        _check_stage(run, name)


@functools.cache
def _like(begin: str) -> Run:
    """The track's own recipe, for its data and network with every default."""
    return loading.load(begin)


def _check_stage(run: Run, name: str) -> None:
    """What a stage may not do: read what was trained elsewhere, learn the judge's own features, measure at no price."""
    stage = run.stages[name]
    for key, network in stage.networks().items():
        if "/" in network:
            raise ConfigError(f"{name}.{key}: {network!r} was trained elsewhere; all counts from random weights here")
    if stage.perceptual:
        raise ConfigError(
            f"{name}.perceptual: weights of other data are not allowed; all counts from random weights here"
        )
    if "features" in stage.distances():
        raise ConfigError(
            f"{name}.objective.distance: 'features' are the judge's own; valid are l2, squared_l2, pseudo_huber"
        )
    t = stage.trajectories
    if t and t.cache:
        raise ConfigError(f"{name}.trajectories.cache: {t.cache!r} was rolled out elsewhere; set it to null")
    if t and t.nfe == "auto":
        raise ConfigError(f"{name}.trajectories.nfe: 'auto' measures with forwards that nobody counts; give a number")
    if (stage.on_nonfinite or run.on_nonfinite) != "stop":
        raise ConfigError(f"{name}.on_nonfinite: a step that is not finite ends an attempt; set it to stop")


def forwards(run: Run, name: str, steps: int | None = None) -> float:
    """Network forwards of a stage, or of its first `steps`, over student and teacher: a backward counts two, a tangent one.

    Trajectories are rolled out round by round, so a round that is begun counts whole.
    """
    resolved = resolve(run, name, Path(name))
    plan = planned(run, name)
    taken = plan.total if steps is None else steps
    each = flops.calls(resolved)["forwards"] / plan.total
    t, rolled = resolved.config.trajectories, 0.0
    if t and resolved.trajectory_rows:
        a_round = 1 if t.mode == "paper" else t.pool_steps
        begun = -(-taken // a_round) * a_round - taken
        rolled = begun * plan.batch * sum(term.times for term in flops.terms(resolved) if term.rows is not None)
    return round(each * taken + rolled, 3)


def planned(run: Run, name: str) -> Schedule:
    """A stage in steps."""
    return resolve(run, name, Path(name)).schedule


def reached(track: Track, figures: Mapping[str, Any]) -> bool:
    """Whether figures of one network are below the target, in both spaces."""
    return all(figures[key] < limit for key, limit in track.target.items())
