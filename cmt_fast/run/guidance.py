"""Guidance only where it means something: whose null class is trained, and what may guide what.

A network's null class is what it predicts without a label: a row of its own in a DiT's or an MLP's table, a label of zeros
in EDM and EDM2. It means something only where labels were dropped in training; classifier-free guidance extrapolates from it,
and from one that nobody trained it leads anywhere. The rule:

* a stage that drops labels trains it;
* a stage that does not drop labels has that of the network that it starts from, roughly kept; from nothing it has none;
* an imported network has what its file's project says, else what the recipe says of its `pre`.

Where a stage has begun, what its own folder says counts, not the recipe that is being read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION, Autoguidance, Run, Stage, Trajectories
from cmt_fast.objectives import OBJECTIVES, taught
from cmt_fast.run.folder import RUN_FILE, located, parents_of, stored_run
from cmt_fast.run.resolved import resolve
from cmt_fast.storage import checkpoint, sound


class Place(NamedTuple):
    """A run, and where its stages are: folder, else `parents`; None where nothing is on disk."""

    run: Run
    folder: Path | None = None
    parents: Path | None = None


class Null(NamedTuple):
    """Whether a network's null class is trained, None where nobody says; why that is so, and what would change it."""

    trained: bool | None
    why: str = ""
    fix: str = ""


def check(place: Place, classes: int) -> None:
    """Raises ConfigError for guidance and dropped labels of any stage, or of the sampler, that mean nothing.

    classes: of the data, 0 without labels. Networks of other runs that are not here yet are passed over.
    """
    run = place.run
    for name, stage in run.stages.items():
        _labels(place, name, stage, classes)
        _dropped(place, name, stage)
        _teacher(place, name, stage)
        _inside(place, name, stage)
        if stage.autoguidance:
            _guide(place, name, stage, stage.autoguidance)
    if run.sampler.told_guidance[0] != 1:
        _told(run)
    if run.sampler.guidance == 1:
        return
    if not _conditional(run, classes):
        raise ConfigError(f"sampler.guidance: {run.sampler.guidance} needs class labels, and {_unread(classes)}")
    if classes == 1:
        raise ConfigError(f"sampler.guidance: {run.sampler.guidance} {ONE}")
    for sampled in dict.fromkeys(s for name, stage in run.stages.items() if (s := _sampled(run, name, stage))):
        check_solver(place, sampled)


def check_solver(place: Place, name: str, key: str = "sampler.guidance") -> None:
    """Raises ConfigError where an ODE solver would guide the network of stage `name` and its null class is not trained.

    key: what asked for the run's `sampler.guidance`.
    """
    scale = place.run.sampler.guidance
    if scale != 1:
        _need(place, name, f"{key}: {scale} guides {name}", f"take {key} 1")


def check_asked(place: Place, name: str, solver: bool, classes: int) -> None:
    """Raises ConfigError where `--guidance`, which is the run's `sampler.guidance` here, means nothing to stage `name`.

    Few-step samples are not guided: a network of few steps draws what it was trained to, and the line says at what scale.
    """
    run = place.run
    scale = run.sampler.guidance
    if not math.isfinite(scale):
        raise ConfigError(f"--guidance: {scale} is not a number")
    if not solver and getattr(run.model, "guided", False):
        most = told_most(place, name)
        if not 1 <= scale <= most:
            told = f"was told scales from 1 to {most:g} in training" if most > 1 else "was told none in training"
            raise ConfigError(
                f"--guidance: {scale} is told to a network that {told}; take another, or a stage that was told"
            )
        return
    if not solver:
        trained = learned(place, name)
        at = f"was trained at guidance {trained}" if trained else "was trained without guidance"
        raise ConfigError(
            f"--guidance: {scale} guides the ODE solver (--solver) alone; {name} draws in few steps what it was trained to, "
            f"and {at}; leave it out, or train at another"
        )
    if not _conditional(run, classes):
        raise ConfigError(f"--guidance: {scale} needs class labels, and {_unread(classes)}")
    if classes == 1 and scale != 1:
        raise ConfigError(f"--guidance: {scale} {ONE}")
    check_solver(place, name, "--guidance")


def learned(place: Place, name: str) -> str:
    """The guidance that stage `name` and those before it were trained to draw, as `1.5 (mid.trajectories.guidance)`; or ""."""
    at, out = _at(place, name), []
    while at is not None:
        place, name = at
        stage = place.run.stages.get(name)
        if stage is None:
            break
        how, o = stage.trajectories, stage.objective
        inside = getattr(o, "omega", 1.0) / (1 - getattr(o, "kappa", 0.0))
        asked = {
            "trajectories.guidance": how.guidance if how and resolve(place.run, name).trajectory_rows else 1.0,
            "teacher_guidance": stage.teacher_guidance,
            "objective.omega and kappa": inside,
        }
        out += [f"{scale:g} ({name}.{key})" for key, scale in asked.items() if scale != 1]
        at = _at(place, stage.start) if stage.start else None
    return ", ".join(out)


def check_apart(key: str, manifests: list[dict]) -> None:
    """Raises ConfigError, for `key`, where the teacher and its guide, by their manifests, are the same weights."""
    sums = [m["files"]["ema-0.safetensors"]["xxh3_128"] for m in manifests]
    if len(sums) > 1 and len(set(sums)) == 1:
        raise ConfigError(f"{key}: has the teacher's own weights and guides nothing; {WEAKER}")


WEAKER = "name a weaker network, smaller or trained for less"
ONE = "guides nothing where the data has one class: with its label and without are the same"


def null_class(place: Place, name: str) -> Null | None:
    """Of the network of stage `name`, RUN/STAGE of another run; None where there is no such run or stage here yet."""
    at = _at(place, name)
    if at is None:
        return None
    place, name = at
    stage = place.run.stages.get(name)
    if stage is None:
        return None
    if not getattr(place.run.model, "conditional", True):
        return Null(False, "it reads no labels (model.conditional: false)", "train it with them")
    file = _imported(place, name)
    if file and isinstance(known := file.get("null_class"), bool):
        return Null(known, f"{file.get('file')} comes of training {'with' if known else 'without'} dropped labels")
    if stage.label_dropout:
        return Null(True, f"{name}.label_dropout is {stage.label_dropout}")
    if file:
        said = f"{file.get('file')} does not say whether labels were dropped in its training"
        return Null(None, said, f"if they were, import it with {name}.label_dropout=0.1")
    if stage.start:
        return null_class(place, stage.start)
    return Null(False, f"{name}.label_dropout is 0", f"train {name} with label_dropout above 0 (published: 0.1)")


def _at(place: Place, name: str) -> tuple[Place, str] | None:
    """Where a stage is, with the run that its folder says it is of, and its name there; None where its run is not here."""
    if "/" in name:
        folder = located(Path(name).parent, place.folder or Path())
        if not (folder / RUN_FILE).is_file():
            return None
        return _at(Place(stored_run(folder), folder, parents_of(folder)), Path(name).name)
    for home in (place.folder, place.parents):
        if home and checkpoint.steps(home / name) and (home / RUN_FILE).is_file():
            return Place(stored_run(home), home, parents_of(home)), name
    return place, name


def _imported(place: Place, name: str) -> dict | None:
    """What the manifest of an imported stage says of its file; None for a stage that was trained, or is not there."""
    folder = (place.folder or Path()) / name
    found = checkpoint.steps(folder) if place.folder else []
    if not found:
        return None
    try:
        parent = sound.read(checkpoint.folder_of(folder, found[-1]) / "manifest.json").get("parent")
    except (OSError, ValueError):
        return None  # whoever reads the weights says what is wrong with it
    return parent if isinstance(parent, dict) and parent.get("stage") == "import" else None


def _need(place: Place, name: str, what: str, otherwise: str) -> None:
    """Raises ConfigError, `what` and why it cannot be, unless the null class of stage `name` is trained or not known yet."""
    null = null_class(place, name)
    if null and not null.trained:
        trained = "is not known to be trained" if null.trained is None else "is not trained"
        fix = f"{null.fix}, or {otherwise}" if null.fix else otherwise
        raise ConfigError(f"{what}, whose null class {trained}: {null.why}; {fix}")


def _conditional(run: Run, classes: int) -> bool:
    return bool(classes) and getattr(run.model, "conditional", True)


def _unread(classes: int) -> str:
    return "this network reads none (model.conditional: false)" if classes else "this data has none"


def _labels(place: Place, name: str, stage: Stage, classes: int) -> None:
    """What needs labels has them, and some are left."""
    how, o = stage.trajectories, stage.objective
    asked = {
        "label_dropout": stage.label_dropout or None,
        "teacher_guidance": None if stage.teacher_guidance == 1 else stage.teacher_guidance,
        "trajectories.guidance": None if how is None or how.guidance == 1 else how.guidance,
        "trajectories.omega_max": None if how is None or how.omega_max == 1 else how.omega_max,
        "objective.omega": None if (w := getattr(o, "omega", 1.0)) == 1 else w,
        "objective.kappa": getattr(o, "kappa", 0.0) or None,
    }
    found = [key for key, value in asked.items() if value is not None]
    if found and not _conditional(place.run, classes):
        what = f"{name}.{found[0]}: {asked[found[0]]}: label_dropout and guidance need class labels"
        raise ConfigError(f"{what}, and {_unread(classes)}")
    if classes == 1 and found and found[-1] != "label_dropout":
        raise ConfigError(f"{name}.{found[-1]}: {asked[found[-1]]} {ONE}")
    if stage.label_dropout == 1:
        raise ConfigError(
            f"{name}.label_dropout: 1.0 drops every label, so that no class is learned; it is a share of rows, published: 0.1"
        )


def _dropped(place: Place, name: str, stage: Stage) -> None:
    """Where the teacher makes the targets of rows without labels, it knows what there is without them."""
    kind = stage.objective.kind
    if not stage.label_dropout or not (stage.trajectory_dropout or taught(stage.objective)):
        return
    if stage.trajectories and stage.trajectory_dropout and stage.trajectories.cache:
        return  # the store says with what dropout it was made, by a teacher that was asked the same
    guide = stage.autoguidance
    guides = guide and (taught(stage.objective) or guide.trajectories)
    for key, other in (
        ("teacher", stage.teacher),
        ("autoguidance.network", guide.network if guide and guides else None),
    ):
        if other:
            what = f"{name}.label_dropout: {stage.label_dropout} with {kind} asks the {key} {other} for targets without labels"
            _need(place, other, what, f"take {name}.label_dropout 0")


def _teacher(place: Place, name: str, stage: Stage) -> None:
    """A guided teacher has a null class, and something to be guided in."""
    kind, how = stage.objective.kind, stage.trajectories
    otherwise = f"guide by {name}.autoguidance, or take 1"
    if stage.teacher_guidance != 1:
        what = f"{name}.teacher_guidance: {stage.teacher_guidance}"
        if not taught(stage.objective):
            valid = ", ".join(kind for kind, row in OBJECTIVES.items() if row.teacher)
            raise ConfigError(
                f"{what} guides nothing here, {kind} takes no step of a teacher; it is of {valid}, and of velocity: teacher"
            )
        if stage.teacher:
            _need(place, stage.teacher, f"{what} guides {stage.teacher}", otherwise)
    if how and how.guidance != 1:
        what = f"{name}.trajectories.guidance: {how.guidance}"
        if not resolve(place.run, name).trajectory_rows:
            raise ConfigError(f"{what} guides nothing here, {kind} draws from no trajectories")
        if stage.teacher and not how.cache:
            _need(place, stage.teacher, f"{what} guides {stage.teacher}", otherwise)
    if how and how.omega_max != 1:
        _told_trajectories(place, name, stage, how)


def _told_trajectories(place: Place, name: str, stage: Stage, how: Trajectories) -> None:
    """Trajectories that have a scale each: a student that is told it, a teacher that it guides, and nothing else that guides."""
    what = f"{name}.trajectories.omega_max: {how.omega_max}"
    if not resolve(place.run, name).trajectory_rows:
        raise ConfigError(f"{what} guides nothing here, {stage.objective.kind} draws from no trajectories")
    if not getattr(place.run.model, "guided", False):
        raise ConfigError(
            f"{what} needs a network that is told its guidance, model.guided true; one scale is {name}.trajectories.guidance"
        )
    if how.cache:
        raise ConfigError(
            f"{what} with {name}.trajectories.cache, whose trajectories are kept without a scale; roll them out, cache null"
        )
    if how.nfe == "auto":
        raise ConfigError(
            f"{what} with {name}.trajectories.nfe auto, which measures one scale alone; name a number of calls"
        )
    if how.guidance != 1 or (stage.autoguidance and stage.autoguidance.trajectories):
        other = "trajectories.guidance" if how.guidance != 1 else "autoguidance.trajectories"
        raise ConfigError(f"{what} beside {name}.{other}; only one may guide")
    if stage.teacher:
        _need(place, stage.teacher, f"{what} guides {stage.teacher}", f"take {name}.trajectories.omega_max 1")


def _told(run: Run) -> None:
    """What the sampler tells a network is a guidance, and the network can be told one."""
    omega, low, high = run.sampler.told_guidance
    if not getattr(run.model, "guided", False):
        raise ConfigError(f"sampler.told_guidance: {omega} is told to no network here; it is for model.guided true")
    most = max(map(_tells, run.stages.values()))
    if omega > most:
        raise ConfigError(
            f"sampler.told_guidance: {omega} is above {most:g}, the largest objective.omega_max of a stage"
        )
    if not (math.isfinite(omega) and omega >= 1 and low < high):
        raise ConfigError(
            f"sampler.told_guidance: [{omega}, {low}, {high}] is no scale of at least 1 with an interval of times"
        )


def told_most(place: Place, name: str) -> float:
    """The largest guidance scale that stage `name` or those before it were told in training, 1 where none was."""
    at, most = _at(place, name), 1.0
    while at is not None and (stage := at[0].run.stages.get(at[1])):
        most = max(most, _tells(stage))
        at = _at(at[0], stage.start) if stage.start else None
    return most


def _tells(stage: Stage) -> float:
    """The largest scale that a stage tells its network, by its objective or its trajectories; 1 where it tells none."""
    how = stage.trajectories
    return max(getattr(stage.objective, "omega_max", 1.0), how.omega_max if how else 1.0)


def _inputs(place: Place, name: str, stage: Stage) -> None:
    """A network that is told its guidance can be told it, and knows what there is without a label; a head is there."""
    o, model, where = stage.objective, place.run.model, f"{name}.objective"
    if getattr(o, "head", False) and getattr(model, "velocity_head", None) is None:
        raise ConfigError(f"{where}.head: true needs the network's auxiliary head, model.velocity_head blocks")
    inside = (getattr(o, "omega", 1.0), getattr(o, "kappa", 0.0)) != (1.0, 0.0)
    if getattr(o, "head", False) and inside:
        raise ConfigError(f"{where}.head: true beside omega and kappa, which guide without a head; take omega_max")
    most = getattr(o, "omega_max", 1.0)
    if most == 1:
        return
    if not getattr(model, "guided", False):
        raise ConfigError(f"{where}.omega_max: {most} needs a network that is told its guidance, model.guided true")
    if inside:
        raise ConfigError(f"{where}.omega_max: {most} beside omega and kappa; only one may guide")
    if not stage.label_dropout:
        why = "the null class that it guides from would not be trained; published: 0.1"
        raise ConfigError(f"{name}.label_dropout: 0.0 with {where}.omega_max {most}, {why}")


def _inside(place: Place, name: str, stage: Stage) -> None:
    """Guidance inside MeanFlow's target is finite, somewhere, and from a null class that the student has."""
    _inputs(place, name, stage)
    o = stage.objective
    omega, kappa = getattr(o, "omega", 1.0), getattr(o, "kappa", 0.0)
    if omega == 1 and kappa == 0:
        return
    where = f"{name}.objective"
    if kappa >= 1:
        raise ConfigError(f"{where}.kappa: {kappa} is not below 1; guidance is of scale omega / (1 - kappa)")
    low, high = getattr(o, "guide_t_min", 0.0), getattr(o, "guide_t_max", 1.0)
    if low >= high:
        raise ConfigError(f"{where}.guide_t_max: {high} is not above guide_t_min, {low}; no time is guided")
    if stage.label_dropout or abs(1 - omega - kappa) < 1e-9:
        return
    what = f"{where}.omega: {omega} with kappa {kappa} takes the null class of {name} itself"
    otherwise = f"take {name}.label_dropout above 0 (published: 0.1), or omega 1 and kappa 0"
    if stage.start is None:
        raise ConfigError(f"{what}, which is not trained: {name}.label_dropout is 0; {otherwise}")
    _need(place, stage.start, f"{what}, begun from {stage.start}", otherwise)


def _guide(place: Place, name: str, stage: Stage, guide: Autoguidance) -> None:
    """Two diffusion models, one not the other. Whether they fit each other is asked where their weights are read."""
    key = f"{name}.autoguidance.network"
    for which, other in (("teacher", stage.teacher), ("guide", guide.network)):
        at = other and _at(place, other)
        found = at and at[0].run.stages.get(at[1])
        if at and found and found.objective.kind not in DIFFUSION and at[0].run.path == place.run.path:
            raise ConfigError(
                f"{key}: the {which} {other} is trained by {found.objective.kind}, for few steps; both must be diffusion models "
                f"({', '.join(DIFFUSION)})"
            )
    if stage.teacher and Path(stage.teacher) == Path(guide.network):
        raise ConfigError(f"{key}: {guide.network!r} is the teacher itself and guides nothing; {WEAKER}")


def _sampled(run: Run, name: str, stage: Stage) -> str | None:
    """The network that the pictures of a stage's training sample by an ODE solver: pre's own, or the teacher's."""
    if name == "pre":
        return name
    if resolve(run, name).cache:
        return None
    return stage.teacher or ("pre" if "pre" in run.stages else None)
