"""What each idea saves: a recipe beside published budgets and beside itself without each idea, on the same cards."""

from __future__ import annotations

import dataclasses
from typing import Any

from cmt_fast.config.schema import Run
from cmt_fast.cost import flops, published, step_time
from cmt_fast.cost.estimate import Rows, StageCost, Way, reckon, stage_bill
from cmt_fast.cost.flops import OURS, Ideas
from cmt_fast.cost.hardware import Card
from cmt_fast.objectives import counting
from cmt_fast.run.resolved import ResolvedStage, resolve

TRAINED = ("mid", "post")
RECIPE = "this recipe"


def savings(run: Run, rows: Rows, card: Card, processes: int) -> list[dict[str, Any]]:
    """Published budgets, this recipe's mid and post, and the recipe without each idea, on the same cards."""
    mine = [name for name in TRAINED if name in run.stages]

    def total(label: str, changed: Run, ideas: Ideas, of: list[str]) -> dict[str, Any]:
        bills = {name: stage_bill(resolve(changed, name), rows, card, processes, ideas)[0] for name in of}
        return _line(label, bills)

    recipe = total(RECIPE, run, OURS, mine)
    out = [*published_lines(run, card, processes), recipe]
    paper, once = (_with(run, mine, mode="paper"), _with(run, mine, mode="pool", per_trajectory=1))
    rounded = _precision(run, mine)
    if any(_some_tangents(resolve(run, name)) for name in mine):
        out.append(total("without selective tangents: on all rows", run, Ideas(selective=False), mine))
    out.append(total("without the pool: each step's own rollouts, all points", paper, OURS, mine))
    out.append(total("without points reused: one of each trajectory (slow CMT)", once, OURS, mine))
    if rounded != run:
        out.append(total("without bf16: TF32", rounded, OURS, mine))
    out.append(total("without the kernels: torch.compile", run, Ideas(how="compile"), mine))
    worst = _precision(paper, mine)
    out.append(total("without all of these (slow CMT aside)", worst, Ideas(False, False, "compile"), mine))
    out.append(total("with trajectories from a cache on disk", run, Ideas(cached=True), mine))
    if not run.mid.half:
        half = dataclasses.replace(run, mid=dataclasses.replace(run.mid, precision="bf16"))
        out.append(total("with bf16 in mid-training, where targets are fixed", half, OURS, mine))
    if getattr(run.model, "checkpoint_activations", False):
        kept = dataclasses.replace(run, model=dataclasses.replace(run.model, checkpoint_activations=False))
        out.append(total("with all activations kept, if they fit", kept, OURS, mine))
    if run.control:
        out.append(total(f"control: {run.control.objective.kind}, no mid-training", run, OURS, ["control"]))
    for line in out:
        hours = line["gpu_hours"] if line["gpu_hours"] is not None else line.get("reported_hours")
        line["ratio"] = hours / recipe["gpu_hours"] if hours else None
    return out


def published_lines(run: Run, card: Card, processes: int) -> list[dict[str, Any]]:
    """The budgets that were published for a recipe, as their own code would run on these cards."""
    return [_published(budget, card, processes) for budget in published.BUDGETS if run.name in budget.recipes]


def _line(label: str, bills: dict[str, StageCost]) -> dict[str, Any]:
    images = sum(b.images for b in bills.values())
    return {
        "what": label,
        "images": images,
        "flops_image": sum(b.flops_image * b.images for b in bills.values()) / images,
        "gpu_hours": sum(b.gpu_hours for b in bills.values()),
        "mark": " and ".join(sorted({b.mark.split(":")[0] for b in bills.values()})),
        "bills": {name: b.lines for name, b in bills.items()},
    }


def _published(budget: published.Budget, card: Card, processes: int) -> dict[str, Any]:
    """A published budget as its own code would run: op by op, weights and optimizer on every card."""
    make = lambda model: flops.network(model, budget.path, budget.shape, budget.classes)
    known = {"student": make(budget.model), "teacher": make(budget.model)}
    if budget.guide:
        known["guide"] = make(budget.guide)
    if budget.distance:
        known["features"] = flops.feature_network(budget.distance, budget.shape)
    bills = {
        p.name: reckon(list(p.work), known, p.images, p.batch, card, processes, Way(p.precision, "eager"))
        for p in budget.parts
    }
    line = _line(budget.name, bills) if bills else {
        "what": budget.name, "images": None, "flops_image": None, "gpu_hours": None, "mark": "reported", "bills": {},
    }  # fmt: skip
    about = {"source": budget.source, "fid": budget.fid, "assumed": budget.assumed, "reported_hours": budget.hours}
    return line | about


def _with(run: Run, names: list[str], **changes) -> Run:
    """The run with other settings of its trajectories."""
    for name in names:
        stage = run.stages[name]
        if stage.trajectories:
            stage = dataclasses.replace(stage, trajectories=dataclasses.replace(stage.trajectories, **changes))
        run = dataclasses.replace(run, **{name: stage})
    return run


def _precision(run: Run, names: list[str]) -> Run:
    """The run with TF32 where it is bf16."""
    for name in names:
        stage = run.stages[name]
        if stage.products == "bf16":
            run = dataclasses.replace(run, **{name: dataclasses.replace(stage, precision="tf32")})
    return run


def classifier(run: Run, rows: Rows, card: Card) -> dict[str, Any] | None:
    """The classifier behind `latent_lpips`: three forwards' work a row, by its own precision, in hours of one card whatever their
    number; None where no stage reads it. Forwards of what is held out are not counted."""
    if not any("latent_lpips" in stage.distances() for stage in run.stages.values()):
        return None
    net, images = flops.feature_network("latent_lpips", tuple(rows.shape), run.features.width), run.features.epochs
    precision = run.features.precision
    us = sum(step_time.microseconds(kind, net, card, "fused", precision)[0] for kind in ("forward", "backward"))
    hours = images * rows.n * us / 3.6e9 if rows.n else None
    return {
        "epochs": images,
        "flops_image": 3 * net.flops,
        "gpu_hours": hours,
        "mark": "predicted",
        "precision": precision,
    }


def _some_tangents(stage: ResolvedStage) -> bool:
    """Whether some rows of a stage carry tangents, and not all."""
    return 0 < counting.work(stage.config.objective, stage.path, stage.rows[0]).tangents < 1
