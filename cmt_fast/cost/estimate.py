"""What a recipe will cost on given cards, before it runs: memory, FLOPs, hours, energy, and what each idea saves.

Every figure is counted (parameters, FLOPs), arithmetic (bytes), measured on such a card or, all others, predicted by
cost.py. Evaluation, checkpoints and waiting for data are not in the hours.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from cmt_fast.config import errors, loading, recipes
from cmt_fast.config.schema import Model, Run
from cmt_fast.cost import disk, hardware, host, memory, published, rounded, step_time
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.flops import OURS, Ideas, Network, Term
from cmt_fast.cost.hardware import Card
from cmt_fast.cost.published import step_work
from cmt_fast.data import classes as in_data
from cmt_fast.data import datasets
from cmt_fast.engine import ShardingPlan, choose
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.run import folder as folder_
from cmt_fast.run import needs
from cmt_fast.run.resolved import ResolvedStage

POWER = 0.9  # of the board's power that training draws: assumed; hosts and cooling are not counted


class Rows(NamedTuple):
    """Rows of the data: shape and classes; n of them, None where it is not known; their bytes on disk, and a note."""

    shape: tuple[int, ...]
    classes: int
    n: int | None
    store_bytes: float | None
    note: str


class StageCost(NamedTuple):
    """A stage on `processes` cards. Microseconds: work_us of an image, the others of a step; lines: the arithmetic.

    scale: measured over predicted time, from results; 1 where nothing of the kind was measured. host_us: below which no step
    can be, 0 where it is not known or a CUDA graph.
    """

    steps: int
    images: int
    flops_image: float
    work_us: float
    optimizer_us: float
    communication_us: float
    step_us: float
    hours: float
    gpu_hours: float
    mark: str
    lines: list[str]
    scale: float = 1.0
    host_us: float = 0.0


class Way(NamedTuple):
    """How a network is trained: precision, kernels (as step_time has them), EMA tracks, and what an engine adds.

    zero, sharded: ZeRO's stage and whether the teacher is sharded, as ShardingPlan has them; passes: of a step; host_us: what
    a step keeps its host busy for, which it cannot be shorter than; 0 where it is a CUDA graph, or not known; networks: the
    kernels of networks alone, where the optimizer has others.
    """

    precision: str
    how: str
    tracks: int = 1
    zero: int | None = None
    passes: int = 1
    sharded: bool = False
    host_us: float = 0.0
    networks: str = ""


def rows_of(run: Run) -> Rows:
    """Of the data at hand or, where the store is not here, of what the recipe expects. Raises ConfigError."""
    expects = getattr(run.data, "expects", None)
    if expects is None or Path(run.data.path).is_dir():
        try:
            data = datasets.load(run.data)
        except errors.ConfigError:
            raise
        except ValueError as error:
            raise errors.ConfigError(str(error)) from None
        path = Path(getattr(run.data, "path", ""))
        held = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if run.data.kind == "latents" else None
        return Rows(data.shape, data.classes, data.n, held, "as it is on disk" if held else "no store")
    n, size = published.images(run.data.path), 1
    for side in expects.shape:
        size *= side
    each, kind = size, "8-bit pixels"
    if latents := expects.shape[0] != 3:
        spread = 1 if expects.shape[0] >= needs.REPRESENTATION else 2
        each, kind = 2 * spread * size, "in fp16" if spread == 1 else "mean and std in fp16"
    held = n * (2 if latents and run.data.flip else 1) if n else 0  # mirror images of latents are rows on disk
    note = f"{held:,} rows x {each:,} bytes, {kind}; arithmetic" if n else "rows unknown, the store is not here"
    classes = in_data.expected(run.data.class_ids, run.data.classes, expects.classes) or 0
    return Rows(expects.shape, classes, n, held * each if n else None, note)


def networks(resolved: ResolvedStage, rows: Rows) -> tuple[dict[str, Network], list[str]]:
    """Student, teacher, guide and feature network of a stage, and notes on what had to be assumed of others' sizes."""
    run, stage, notes = resolved.run, resolved.config, []
    make = lambda model: flops_.network(model, run.path, tuple(rows.shape), rows.classes)
    out = {"student": make(run.model)}
    named = stage.networks()
    for of, key in (("teacher", "teacher"), ("guide", "autoguidance.network")):
        if key in named:
            model, note = _model(run, named[key])
            out[of] = make(model)
            notes += [note] * bool(note)
    wanted = sorted(stage.distances() & set(PERCEPTUAL))
    if wanted:
        out["features"] = flops_.feature_network(wanted[0], tuple(rows.shape), run.features.width)
    if "features" in stage.distances():
        notes.append(f"{resolved.name}: the run's own classifier behind the distance 'features' is not counted")
    return out, notes


def _model(run: Run, name: str) -> tuple[Model, str]:
    """The model of a stage of this run or of another: by its run, the recipe of its name, or a public network's."""
    if "/" not in name:
        return run.model, ""
    folder = Path(name).parent
    if (folder / folder_.RUN_FILE).is_file():
        return folder_.stored_run(folder).model, ""
    if folder.name in recipes.recipes():
        return loading.load(
            folder.name
        ).model, f"{name} is not here; taken from the recipe {folder.name}, whose own training is not counted"
    public = published.public_network(folder.name)
    if public:
        return public, f"{name} is not here; taken for EDM2-{public.size} by its name"
    return run.model, f"{name} is not here and its size not known; taken for the student's"


def reckon(
    work: list[Term], known: dict[str, Network], images: int, batch: int, card: Card, processes: int, way: Way
) -> StageCost:
    """The bill of `images` student images in steps of `batch`."""
    precision, how, zero = way.precision, way.how, way.zero
    total, lines = 0.0, []
    for term in work:
        rounds = ("tf32" if precision == "tf32" else "fp32") if term.of == "features" else precision
        us, text = step_time.microseconds(term.kind, known[term.of], card, way.networks or how, rounds)
        if term.wide:
            slow, _ = step_time.microseconds(term.kind, known[term.of], card, way.networks or how, "fp32")
            part = term.wide / term.times
            us, text = us + part * (slow - us), f"{text}, {part:.0%} of it in fp32: {slow:,.1f} us"
        small, more = step_time.call_us(term, known[term.of], us, card, rounds, processes)
        total += term.times * us + small
        what = f"{term.times:.4g} x {term.of} {term.kind} ({known[term.of].name}; {term.why})"
        lines.append(f"{what}: {term.times * us + small:,.1f} us = {term.times:.4g} x [{text}]{more}")
    scale, mark = calibration(work, known, card, precision)
    total *= scale
    if processes > 1 and mark.startswith("measured"):
        mark += " on one card, communication predicted"
    student = known["student"].parameters
    optimizer = scale * step_time.optimizer_us(student, way.tracks, card, how, processes if zero else 1)
    calls = sum(t.times * (batch / t.rows if t.rows else way.passes) * known[t.of].parameters
                for t in work if t.of in ("teacher", "guide")) if way.sharded else 0  # fmt: skip
    sent = step_time.communication_us(zero, student, calls, card, processes, way.passes)
    steps = -(-images // batch)
    busy = batch / processes * total + optimizer + sent
    step = max(busy, way.host_us)
    hours = steps * step / 3.6e9
    lines.append(
        f"step: {batch}/{processes} rows x {total:,.1f} us + optimizer {optimizer:,.0f} us"
        + (f" (both times {scale:.3g}, {mark})" if scale != 1 else "") + f" + communication {sent:,.0f} us = {busy:,.0f} us"
        + (f"; its host takes {step:,.0f} us" if step > busy else "")
    )  # fmt: skip
    lines.append(
        f"{steps:,} steps x {step:,.0f} us = {hours:,.2f} h x {processes} = {hours * processes:,.2f} GPU-hours"
    )
    flops = flops_.flops_image(work, known)
    return StageCost(
        steps,
        steps * batch,
        flops,
        total,
        optimizer,
        sent,
        step,
        hours,
        hours * processes,
        mark,
        lines,
        scale,
        way.host_us,
    )


def step_us(work: list[Term], net: Network, card: Card, how: str, precision: str, batch: int) -> float:
    """Predicted microseconds an image of a step on one card, whose teacher is of the student's size."""
    known = {"student": net, "teacher": net}
    return reckon(work, known, batch, batch, card._replace(steps=()), 1, Way(precision, how)).step_us / batch


def calibration(work: list[Term], known: dict[str, Network], card: Card, precision: str) -> tuple[float, str]:
    """Measured over predicted time of a network's steps on this card, and how to mark what it is applied to.

    Of the very same work it is that step's own ratio, else the mean of the ratios of all steps of this network; of a DiT
    that nobody has measured the mean over those that were, which is what the model's passes and rates miss on this card.
    """
    net, mine = known["student"], _units(work, known)
    steps = [step for step in card.steps if step.precision == precision] if net.depth else []
    own = [s for s in steps if (s.width, s.depth, s.tokens) == (net.width, net.depth, net.tokens)]
    ratios = []
    for step in own or steps:
        of, plain = (
            net if own else flops_.dit_network(step.width, step.depth, step.tokens),
            step_work(step.objective, step.teacher),
        )
        ratio = step.us / step_us(plain, of, card, "fused", precision, step.batch)
        if own and mine == _units(plain, {"student": net, "teacher": net}):
            return ratio, f"measured: {step.source}"
        ratios.append((ratio, step.source))
    if not ratios:
        return 1.0, "predicted"
    whose = "the" if own else "another network's"
    return sum(r for r, _ in ratios) / len(ratios), f"predicted, scaled by {whose} measured steps of {ratios[0][1]}"


def _units(work: list[Term], known: dict[str, Network]) -> dict[tuple[str, str], float]:
    """Work by network and kind, to see whether two are the same."""
    out: dict[tuple[str, str], float] = {}
    for t in work:
        key = (known[t.of].name, t.kind)
        out[key] = round(out.get(key, 0.0) + t.times, 6)
    return out


def stage_bill(
    resolved: ResolvedStage, rows: Rows, card: Card, processes: int, ideas: Ideas = OURS
) -> tuple[StageCost, ShardingPlan, dict[str, Network]]:
    """What a stage costs, with the sizing of its engine. Raises ConfigError where rows do not divide over the cards."""
    known, _ = networks(resolved, rows)
    return *bill_of(resolved, rows, known, card, processes, ideas), known


def bill_of(
    resolved: ResolvedStage, rows: Rows, known: dict[str, Network], card: Card, processes: int, ideas: Ideas = OURS
) -> tuple[StageCost, ShardingPlan]:
    """The same of networks that are known already."""
    stage = resolved.config
    choice = sharding_plan(resolved, rows, known, card, processes)
    passes, waits = resolved.grad_accum_steps(processes), 0.0
    if ideas.host and not host.captured(stage, choice.stage, card):
        busy = host.of_stage(resolved, known, (tuple(rows.shape), rows.classes), card, passes)
        waits = busy.us if busy else 0.0
    # fp16 takes the reference of every op: the kernels know fp32 and bf16
    plain = "eager" if stage.products == "fp16" and ideas.how == "fused" and not stage.compile else ""
    way = Way(
        hardware.rate_of(stage),
        ideas.how,
        len(stage.ema),
        choice.stage,
        passes,
        choice.teacher_sharded,
        waits,
        plain,
    )
    work = rounded.split(flops_.terms(resolved, ideas), resolved, processes)
    bill = reckon(work, known, stage.images_nimg, stage.batch, card, processes, way)
    return bill, choice


def sharding_plan(
    resolved: ResolvedStage, rows: Rows, known: dict[str, Network], card: Card, processes: int
) -> ShardingPlan:
    """The engine's ZeRO stage by the memory of the card."""
    run, stage = resolved.run, resolved.config
    named = {key: text for key, text in resolved.called.items() if key != "start"}
    by_key = {"teacher": "teacher", "autoguidance.network": "guide"}
    held = sum({text: known[by_key[key]].parameters for key, text in named.items()}.values())
    own = flops_.size(run.model, run.path, tuple(rows.shape), rows.classes)
    size = own._replace(teacher_parameters=held, tracks=len(stage.ema), bf16=stage.half)
    return choose(run.engine, run.zero_stage, run.zero_teacher, size, processes, int(card.memory))


def held(
    resolved: ResolvedStage, rows: Rows, known: dict[str, Network], choice: ShardingPlan, card: Card, processes: int
) -> memory.Memory:
    """What a stage holds on one of `processes` cards, part by part."""
    return memory.of_stage(resolved, tuple(rows.shape), rows.classes, known, choice, card, processes)


def judging_hours(judged: disk.Judging, student: Network, card: Card, processes: int) -> float:
    """Hours of the samples that a stage is judged by while it trains: forwards in fp32, shared out; their features aside."""
    us = step_time.microseconds("forward", student, card, "fused", "fp32")[0]
    return judged.forwards * us / 3.6e9 / processes


def judged_once(run: Run, student: Network, card: Card, processes: int) -> dict[str, float]:
    """What `cmt eval` of one stage takes as the recipe has it: samples, hours of their forwards, features a process keeps."""
    found = disk.final(run)
    return {**found._asdict(), "hours": judging_hours(found, student, card, processes)}


def rolling_hours(resolved: ResolvedStage, known: dict[str, Network], card: Card, processes: int) -> float:
    """Hours of rolling out all of a stage's trajectories, as its steps or `cmt trajectories` do it; 0 for one without."""
    t = resolved.config.trajectories
    if t is None:
        return 0.0
    rolled = resolved.replaced(trajectories=dataclasses.replace(t, cache=None))
    precision = hardware.rate_of(resolved.config)
    us = 0.0
    for term in flops_.terms(rolled):
        if term.rows:
            each, _ = step_time.microseconds(term.kind, known[term.of], card, "fused", precision)
            us += term.times * each + step_time.call_us(term, known[term.of], each, card, precision, processes)[0]
    return resolved.config.images_nimg * us / 3.6e9 / processes


def energy_kwh(gpu_hours: float, card: Card) -> float | None:
    """Board power x its share in training x hours; None for a card whose power is not known."""
    return None if card.watts is None else gpu_hours * card.watts * POWER / 1e3
