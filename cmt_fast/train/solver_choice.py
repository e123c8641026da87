"""`nfe: auto`, settled when a stage begins: the student's own one-step error, and the solver that stays below it.

epsilon = E|f(x_T, T) - Psi(x_T)|^2 per dimension, Psi the limit of the most accurate rollouts at hand. It is known

* by measurement, where the stage starts from a network that is a few-step student already (post-training's anchor,
  which starts from mid-training) or where a finished student is named;
* else from a pilot: the stage itself in two miniatures of s and 2s steps, s at most `PILOT` and an eighth of the stage,
  each with its whole schedule in small, on trajectories of the most accurate affordable setting. Their errors are
  continued as a power law to the stage's length: epsilon(n) = epsilon(2s) (epsilon(2s) / epsilon(s))^log2(n / 2s).
  Curves of this kind flatten, so the law errs on the side of a small epsilon, which asks for a better solver, not for a
  worse one. It is an extrapolation and is printed as one.

What it is worth by the theory (evaluation/theory.py): the gradient of post-training differs from that of the oracle by a bias
B <= C (E|f - Psi|^2 + what the loss itself adds), f the network that it starts from. So beside epsilon stands the same error of
the diffusion model that the stage starts from: (epsilon + the solver's error squared) over it is the share of the bound that
mid-training leaves. It is of t = T alone, and a bound, not the bias; nothing is chosen by this share.

A stage with `trajectories.budget_forwards` is chosen for by the bound itself: the pilots say how epsilon falls with images,
the budget how many images each solver leaves, and the least sum of both errors is taken, teacher/solver_worth.py. The stage is
then as long as its budget. Where the student's error was not measured in pilots, solver and calls are chosen as without a budget.

The rollouts and networks are fp32: rounding in tf32 or bf16 is no part of a solver's error. What was chosen is written
to RUN/STAGE/solver.json before the first step and read from there ever after; it enters the stage's manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION, Stage
from cmt_fast.diffusion.few_steps import sample_consistency, sample_jumps
from cmt_fast.run.resolved import ResolvedStage, budgeted
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint, files, sound
from cmt_fast.teacher import solver_error, solver_record, solver_worth
from cmt_fast.teacher.precision import Teacher
from cmt_fast.train import batches

PILOT = 200  # steps of the shorter of the two miniatures, at most
_NO_LAW = "nothing says how the student's error falls with images: no pilots were taken"
PROBE = 16  # network calls near which the limit is looked for


class Search(NamedTuple):
    """How a solver is looked for: trajectories, the calls to try, epsilon as typed, the RUN/STAGE to measure it of.

    whole: the table to its end; grids: other grids than the recipe's too; budget: forwards of the stage, in the place of its own.
    """

    count: int = solver_error.COUNT
    nfes: tuple[int, ...] = solver_error.NFE
    epsilon: float | None = None
    student: str | None = None
    margin: float = solver_error.MARGIN
    whole: bool = False
    grids: bool = False
    budget: int | None = None


def settle(work: Workspace, stage: ResolvedStage) -> dict[str, dict]:
    """Choose what `nfe: auto` of a stage is, unless that is done. Returns what the manifest keeps of it, {} without auto.

    Every rank must call it. Raises ConfigError where the stage has begun with other networks than were rolled out.
    """
    name, folder = stage.name, stage.folder
    if not (stage.trajectory_rows and stage.trajectories.nfe == "auto"):
        return {}
    kept = _of_the_first(folder)
    if kept and kept.networks != networks(work, stage.config):
        if checkpoint.steps(folder):
            raise ConfigError(
                f"{name}.teacher: is not the network that {folder / solver_record.FILE} was measured with"
            )
        kept = None
    if kept is None:
        kept = measure(work, stage)
        distributed.agreed(lambda: write(work, name, kept) if distributed.rank() == 0 else None)
        kept = _of_the_first(folder)
        assert kept is not None
        if distributed.rank() == 0:
            for line in summary(name, kept):
                progress.say(f"{name:>8} {line}")
    distributed.all_see((folder / solver_record.FILE).is_file)  # who draws reads it
    return {"trajectories": {**kept.choice, **({"images_nimg": kept.images} if kept.images else {})}}


def as_long(stage: ResolvedStage) -> ResolvedStage:
    """A stage that is settled, as long as its budget."""
    t = stage.config.trajectories
    return stage if t is None or t.budget_forwards is None else budgeted(stage, stage.folder)


def _of_the_first(folder: Path) -> solver_record.Kept | None:
    """What the first rank reads: others may see the file late, and would measure alone. Raises ConfigError on all."""

    def read() -> bytes:
        kept = solver_record.read(folder)
        return json.dumps(kept and kept._asdict()).encode()

    kept = json.loads(distributed.from_first(read, ConfigError))
    return kept and solver_record.Kept(**kept)


def write(work: Workspace, name: str, kept: solver_record.Kept) -> None:
    """RUN/STAGE/solver.json, whole or not at all."""
    (work.folder / name).mkdir(parents=True, exist_ok=True)
    files.write_text(work.folder / name / solver_record.FILE, sound.signed({"stage": name, **kept._asdict()}))


def summary(name: str, kept: solver_record.Kept) -> list[str]:
    """What was chosen and why, for the terminal and the report."""
    e, w = kept.epsilon, kept.worth
    chosen = next(row for row in kept.rows if all(row[k] == v for k, v in kept.choice.items()))
    bound = e.get("bias")  # of records since it is looked at
    below = "at most" if kept.serves else "ABOVE, with every candidate,"
    by_error = f", its upper end {below} {kept.limit:.3g}" if w is None or w["rule"] == "error" else ""
    return [
        f"solver: {solver_record.override(name, kept.choice)}; error {chosen['error']:.3g} ({chosen['low']:.3g} to "
        f"{chosen['high']:.3g}){by_error}",
        f"one-step error of the student {math.sqrt(e['value']):.3g} RMS per dimension (epsilon {e['value']:.3g}), "
        f"{e['source']}",
        *([] if w is None else [solver_record.told(w)]),
        *(
            [
                f"theory: it leaves {bound['after'] / bound['before']:.2g} of the bound on the bias of post-training's gradient, "
                f"{bound['after']:.3g} where {bound['start']} has {bound['before']:.3g}; the solver is "
                f"{chosen['error'] ** 2 / bound['after']:.1%} of what is left"
            ]
            if bound and chosen["error"] is not None
            else []
        ),
        f"measured on {kept.trajectories} trajectories with {kept.calls:,} network calls"
        + (f", {e['calls']:,} more in the pilot" if e.get("calls") else ""),
    ]


def networks(work: Workspace, stage: Stage) -> dict[str, str]:
    """Checksums of the networks that are rolled out."""
    named = {k: n for k, n in stage.networks().items() if k != "start"}
    return {k: work.finished(n).manifest["files"]["ema-0.safetensors"]["xxh3_128"] for k, n in named.items()}


def endpoints(
    work: Workspace, stage: ResolvedStage, advance: Callable[[int], None], count: int = solver_error.COUNT
) -> solver_error.Endpoints:
    """Rollouts of a stage's teacher, under its guidance."""
    network = functools.partial(work.network, together=True)
    rolled = Teacher(stage.name, stage.config, network, work.path, work.device).net("fp32")
    t, data = stage.trajectories, work.data
    dropout = stage.config.trajectory_dropout
    x, labels = solver_error.starts(work.path, t, data.shape, work.drawn, work.run.seed, work.device, count, dropout)
    return solver_error.Endpoints(rolled, work.path, x, labels, t, advance)


def measure(work: Workspace, stage: ResolvedStage, search: Search | None = None) -> solver_record.Kept:
    """Estimate and choose. Raises ConfigError where no candidate divides."""
    search = search or Search()
    if stage.trajectories.omega_max != 1:
        raise ConfigError(
            f"{stage.name}.trajectories.omega_max: {stage.trajectories.omega_max} draws a scale a trajectory, and a solver is "
            "measured at one; measure at the largest (omega_max 1, guidance)"
        )
    name, nfes, candidates = stage.name, search.nfes, stage.candidates(search.nfes, search.grids)
    if not candidates:
        raise ConfigError(f"--nfe: {', '.join(map(str, nfes))}: none makes whole trajectories of {name}'s batches")
    budget = stage.trajectories.budget_forwards if search.budget is None else search.budget
    by_bound = solver_error.calls_along(candidates, search.count) if budget else 0
    total = by_bound + (0 if budget and not search.whole else solver_error.calls(candidates))
    with progress.counting("solver", total, work.folder) as advance:
        ends = endpoints(work, stage, advance, search.count)
        probe = min((nfe for _, nfe in candidates), key=lambda nfe: abs(nfe - PROBE))
        sure = solver_error.best(ends.estimate(s, n) for s, n in candidates if n == probe)
        limit = ends.limit(sure.setting, probe)[0]
        known = _epsilon(work, stage, ends, limit, sure, search)
        before = _before(work, stage, ends, limit)
        law = _law(known) if budget else None
        if budget and law:
            weighing = solver_worth.Budget(functools.partial(stage.affords, budget), law, search.margin**2)
            found = solver_worth.choose(ends, candidates, weighing, sure.setting, search.whole)
            estimates, choice = [w.estimate for w in found.weighed if w.estimate], found.best.estimate
            known |= {
                "value": found.best.epsilon,
                "source": _extrapolated(found.best.images // stage.config.batch, known),
            }
            rows = [solver_worth.row_of(w) for w in found.weighed]
            worth = {"budget_forwards": budget, **solver_worth.grounds(found, weighing)}
        else:
            limit_of = search.margin * math.sqrt(known["value"])
            estimates, choice = solver_error.choose(ends, candidates, limit_of, search.whole)
            rows, worth = solver_record.rows_of(estimates), _unweighed(stage, budget, choice) if budget else None
    assert choice is not None
    bound, common = search.margin * math.sqrt(known["value"]), solver_error.best(estimates)
    limit = ends.limit(common.setting, common.nfe)[0]
    if before is not None and math.isfinite(choice.error):
        known["bias"] = {"start": stage.config.start, "before": before, "after": known["value"] + choice.error**2}
    of = {(e.setting, e.nfe): e for e in estimates}
    for row in rows:
        e = of.get((solver_error.Solver(*(row[k] for k in solver_error.Solver._fields)), row["nfe"]))
        row["common"] = ends.distance(e, limit) if e and math.isfinite(e.error) else None
    calls = ends.count * (ends.calls * stage.guided + (before is not None)) + ends.apart * stage.guided
    return solver_record.Kept(
        choice={**choice.setting._asdict(), "nfe": choice.nfe}, serves=choice.high <= bound, limit=bound, epsilon=known,
        networks=networks(work, stage.config), trajectories=ends.count, calls=calls, rows=rows, worth=worth,
    )  # fmt: skip


def _unweighed(stage: ResolvedStage, budget: int, choice: solver_error.Estimate) -> dict[str, Any]:
    """Of a stage with a budget whose solver was chosen as without one: its length follows all the same."""
    images = max(stage.affords(budget, choice.setting, choice.nfe), stage.config.batch)
    return {"budget_forwards": budget, "rule": "error", "images": images, "why": _NO_LAW}


def _law(known: dict[str, Any]) -> solver_worth.Law | None:
    """How the student's error falls, where pilots have shown it."""
    if "pilots" not in known:
        return None
    (few, first), (many, second) = ((int(images), e) for images, e in known["pilots"].items())
    return solver_worth.Law((few, many), (first, second)) if few < many else None


def _extrapolated(steps: int, known: dict[str, Any]) -> str:
    """Where an epsilon is from."""
    short, long = known["steps"]
    return f"extrapolated to {steps:,} steps from pilots of {short} and {long}"


def _epsilon(
    work: Workspace, stage: ResolvedStage, ends: solver_error.Endpoints, limit: Tensor, sure: solver_error.Estimate,
    search: Search,
) -> dict[str, Any]:  # fmt: skip
    """The student's one-step error, a mean square per dimension, and how it is known."""
    if search.epsilon is not None:
        return {"value": search.epsilon, "source": "as given"}
    student, parent = search.student, stage.config.start
    if student is None and parent and work.run.stages[parent].objective.kind not in DIFFUSION:
        student = parent
    if student:
        value = one_step_error(work, work.network(student, together=True), ends, limit)
        return {"value": value, "source": f"measured of {student}", "student": student}
    total = stage.schedule.total
    short = max(1, min(PILOT, total // 8))
    how = dataclasses.replace(solver_error.apply(stage.trajectories, sure.setting, sure.nfe), precision="fp32")
    errors, rows = [], 0
    for steps in (short, 2 * short):
        net = pilot(work, stage.replaced(trajectories=how), steps)
        errors.append(one_step_error(work, net, ends, limit))
        rows += steps * stage.config.batch
    ratio = min(errors[1] / errors[0], 1.0)
    value = errors[1] * ratio ** math.log2(max(total / (2 * short), 1.0))
    seen = {str(s * stage.config.batch): e for s, e in zip((short, 2 * short), errors)}
    calls = round(rows * (3 + sure.cost * stage.guided))
    found = {"value": value, "pilots": seen, "calls": calls, "steps": [short, 2 * short]}
    return {**found, "source": _extrapolated(total, found)}


def _before(work: Workspace, stage: ResolvedStage, ends: solver_error.Endpoints, limit: Tensor) -> float | None:
    """The one-step error of the diffusion model that the stage starts from; None without one, or where it is not finite."""
    start = stage.config.start
    if start is None or work.run.stages[start].objective.kind not in DIFFUSION:
        return None
    try:
        found = one_step_error(work, work.network(start, together=True), ends, limit)
    except FloatingPointError:
        return None
    return found if found > 0 else None


def pilot(work: Workspace, stage: ResolvedStage, steps: int) -> Callable:
    """The stage in `steps` steps, its whole schedule made small; nothing is written. Returns its EMA network."""
    total, config = stage.schedule.total, stage.config
    small = stage.replaced(
        images_nimg=steps * config.batch, warmup_nimg=config.warmup_nimg * steps // total, compile=False,
        lr_knee_nimg=max(config.lr_knee_nimg * steps // total, int(config.lr_schedule == "inverse_sqrt")),
    )  # fmt: skip
    plan, grad_accum_steps = small.schedule, small.grad_accum_steps(distributed.size())
    engine = work.engine_of(small, grad_accum_steps, work.sharding_plan(stage))
    if small.config.start:
        engine.start_from(work.weights(small.config.start, together=True)[0])
    source = batches.provider(work, small, engine)
    try:
        for step in range(plan.total):
            for part in range(grad_accum_steps):
                engine.backward(source.loss(engine, step, part)[0])
            engine.step(plan.lr(small.config, step))
    finally:
        source.close()
    net = engine.average()
    engine.close()
    return net


@torch.no_grad()
def one_step_error(work: Workspace, net: Callable, ends: solver_error.Endpoints, limit: Tensor) -> float:
    """E|f(x_T, T) - Psi(x_T)|^2 per dimension over the starts of all ranks; limit: Psi (n, D)."""
    parts = []
    for rows in torch.arange(len(ends.x), device=ends.x.device).split(ends.config.rollout_batch):
        x, labels = ends.x[rows], None if ends.labels is None else ends.labels[rows]
        jump = work.path.name == "linear"
        made = (
            sample_jumps(net, x, 1, labels) if jump else sample_consistency(net, x, ends.config.t_max, (), [], labels)
        )
        parts.append(made)
    f = distributed.gather_rows(torch.cat(parts)).cpu().double().flatten(1)
    value = float((f - limit).square().mean())
    if not math.isfinite(value):
        raise FloatingPointError("the student's one-step endpoints are not finite")
    return value
