"""From a recipe as it is written to a budget, lever by lever: what each would leave of the hours, and what is missing then.

Each line stands on those before it. Some levers are in the plan, some need what is not built, some save nothing; the
last says how much faster the networks' own work would have to run. All of it is predicted.
"""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.config.schema import CmtCm, CmtMf, Ect
from cmt_fast.cost import estimate, flops, levers, rounded, step_time
from cmt_fast.cost.flops import Term
from cmt_fast.cost.hardware import rate_of
from cmt_fast.cost.plan import Machine, Plan
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.run.resolved import ResolvedStage, resolve

TAKEN, OPEN, UNBUILT, REFUSED, LACKING = "in the plan", "possible", "not built", "not measured", "missing"
USELESS = "no gain"


class Line(NamedTuple):
    """gpu_hours: of all stages with this lever and those above; None of a line that says what is missing."""

    what: str
    gpu_hours: float | None
    state: str
    why: str


class Hours(NamedTuple):
    """On the clock: `work` of networks, `rest` of optimizer, communication and judging, `idle` where the host is slower."""

    work: float
    rest: float
    idle: float = 0.0

    @property
    def all(self) -> float:
        """Together."""
        return self.work + self.rest + self.idle


class _Ways(NamedTuple):
    cached: bool = False
    features: bool = False
    hidden: bool = False
    graph: bool = False
    frozen: bool = False
    rounded: bool = False


def lines(plan: Plan, machine: Machine) -> list[Line]:
    """The levers from the recipe as it is written to the plan's budget, for all images of its stages."""
    gpus, whole, run = machine.gpus, plan.whole, plan.full.run
    out = []
    if plan.written is not None:
        out.append(Line("the recipe as it is written", gpus * plan.written, TAKEN, "whether it fits in memory or not"))
    length = ("images_nimg", "budget_forwards")
    named = lambda changes: ", ".join(c.override for c in changes if not c.key.endswith(length)) or "no change"
    out.append(Line("laid out for these cards", gpus * whole.hours, TAKEN, named(whole.changes)))
    method = [c for c in plan.full.changes if c.method]
    if method:
        out.append(Line("changes of the method", gpus * plan.full.hours, TAKEN, named(method)))
    names = [s.name for s in plan.full.stages]
    stages = [resolve(run, name) for name in names]
    ways, at = _Ways(), Hours(0, plan.full.hours)
    for step in _steps(stages, machine):
        tried = ways._replace(**{step[0]: True})
        after = _hours(plan, stages, machine, tried)
        if after.all < at.all * 0.999:
            out.append(Line(step[1], gpus * after.all, step[2], step[3]))
            ways, at = tried, after
        elif step[0] == "rounded":  # the one that may cost more than it saves, and is often asked for
            out.append(Line(step[1], None, USELESS, step[3]))
    return [*out, *_missing(plan, stages, machine, ways)]


def _steps(stages: list[ResolvedStage], machine: Machine) -> list[tuple[str, str, str, str]]:
    """(way, what, state, why) of the levers that no plan takes, in the order in which they are added."""
    found = []
    if any(s.trajectory_rows and not s.cache for s in stages):
        why = "written once by `cmt trajectories`, then the teacher's work is paid; worth it from the second student on"
        found.append(("cached", "trajectories that another run has paid for", OPEN, why))
    if any(s.config.distances() & set(PERCEPTUAL) and s.config.products != "tf32" for s in stages):
        why = "published code has it so; here it is in fp32 beside bf16"
        found.append(("features", "the feature network in TF32", UNBUILT, why))
    if machine.gpus > 1:
        found.append(
            ("hidden", "communication hidden behind the backward", UNBUILT, "none of it is taken to be hidden here")
        )
    why = "which the local engine's steps are on a GPU, where a process can hold everything; ZeRO's are not"
    found.append(("graph", "steps as CUDA graphs, which wait for no host", OPEN, why))
    slow = [s for s in stages if s.config.products != "bf16" and levers.gains(s.config, machine.card)]
    if slow:
        of = " and ".join(s.name for s in slow)
        why = "they need no gradient; how far bf16 moves their step is to be measured first"
        found.append(("frozen", f"{of}: teacher and guide in bf16", UNBUILT, why))
        found.append(("rounded", f"{of}: the student in bf16 too", *_of_student(slow, machine.gpus)))
    return found


def _of_student(slow: list[ResolvedStage], gpus: int) -> tuple[str, str]:
    """(state, why) of 16 bits for the student: targets that are fixed, or the rule of objectives/rounding.py."""
    if not all(isinstance(s.config.objective, (CmtCm, CmtMf, Ect)) for s in slow):
        return REFUSED, "its recipe says otherwise, and no measurement here says that bf16 serves it"
    shares = [(s.name, rounded.share(s, gpus, "bf16")) for s in slow if isinstance(s.config.objective, Ect)]
    kept = ", ".join(f"about {share:.0%} of {name}'s rows" for name, share in shares)
    return OPEN, f"its rounding_limit leaves {kept} to fp32 (by {rounded.SOURCE})" if kept else "its targets are fixed"


def _hours(plan: Plan, stages: list[ResolvedStage], machine: Machine, ways: _Ways) -> Hours:
    """Hours on the clock of the whole stages, these ways."""
    work = rest = idle = 0.0
    for stage, planned in zip(stages, plan.full.stages):
        known, _ = estimate.networks(stage, machine.rows)
        ideas = flops.Ideas(cached=ways.cached)
        low = "bf16" if ways.rounded and levers.gains(stage.config, machine.card) else None
        terms = rounded.split(flops.terms(stage, ideas), stage, machine.gpus, low)
        us = planned.cost.scale * sum(_us(t, known, stage, machine, ways) for t in terms)
        sent = 0.0 if ways.hidden else planned.cost.communication_us
        step, others = stage.config.batch / machine.gpus * us, planned.cost.optimizer_us + sent
        waits = 0.0 if ways.graph else max(0.0, planned.cost.host_us - step - others)
        work += planned.cost.steps * step / 3.6e9
        rest += planned.cost.steps * others / 3.6e9 + planned.judging_hours
        idle += planned.cost.steps * waits / 3.6e9
    return Hours(work, rest, idle)


def _us(term: Term, known: dict, stage: ResolvedStage, machine: Machine, ways: _Ways) -> float:
    """Microseconds a student image of one term, as estimate.reckon has them."""
    low = ways.rounded or (ways.frozen and term.of in ("teacher", "guide"))
    precision = "bf16" if low and levers.gains(stage.config, machine.card) else rate_of(stage.config)
    if term.of == "features":
        precision = "tf32" if ways.features or stage.config.products == "tf32" else "fp32"
    us, _ = step_time.microseconds(term.kind, known[term.of], machine.card, "fused", precision)
    if term.wide:
        slow, _ = step_time.microseconds(term.kind, known[term.of], machine.card, "fused", "fp32")
        us += term.wide / term.times * (slow - us)
    return term.times * us + step_time.call_us(term, known[term.of], us, machine.card, precision, machine.gpus)[0]


def _missing(plan: Plan, stages: list[ResolvedStage], machine: Machine, every: _Ways) -> list[Line]:
    """How much faster the networks would have to run for the budget to hold all images: as planned, and with the levers."""
    cases = {"as planned": _Ways(), "with every lever above": every}
    return [
        _lacks(what, _hours(plan, stages, machine, ways), ways, plan, stages, machine) for what, ways in cases.items()
    ]


def _lacks(
    what: str, at: Hours, ways: _Ways, plan: Plan, stages: list[ResolvedStage], machine: Machine
) -> Line:  # fmt: skip
    """The line of one case."""
    budget, gpus = plan.budget, machine.gpus
    if at.all <= budget:
        return Line(f"{what}: nothing", None, LACKING, f"{gpus * at.all:,.4g} GPU-hours are within the budget")
    short = f"{what}: {gpus * (at.all - budget):,.4g} GPU-hours"
    if at.rest >= budget:
        return Line(
            short, None, LACKING, "no speed of the networks suffices: optimizer, communication and judging take longer"
        )
    times = at.work / (budget - at.rest)
    why = (
        f"the networks' work would have to run {times:.2f} times as fast"
        if times > 1
        else "no step may wait for its host"
    )
    return Line(short, None, LACKING, why + (_share(stages, machine, times, ways) if times > 1 else ""))


def _share(stages: list[ResolvedStage], machine: Machine, times: float, ways: _Ways) -> str:
    """That factor as a share of the datasheet's rate, where the time of networks is one."""
    known, _ = estimate.networks(stages[-1], machine.rows)
    if known["student"].depth:
        return ""
    precision = "bf16" if ways.rounded else rate_of(stages[-1].config)
    share = step_time.SHARE[precision]
    return f": at {share * times:.2f} of the datasheet's rate, and {share} is assumed here (no step of this network was measured)"
