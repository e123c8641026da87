"""What one process holds on its card, part by part, each with where its figure is from; and the check against the card.

Parts of a step and of an evaluation take turns, all others stay: the most is what stays and the larger of the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cmt_fast.config.schema import Model
from cmt_fast.cost import activations, rounded
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.flops import Network
from cmt_fast.cost.hardware import Card, rate_of
from cmt_fast.engine import ShardingPlan
from cmt_fast.engine.sharding import gb
from cmt_fast.objectives import taught
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.teacher import pool

USABLE = (
    0.93  # of a card's memory: its context, fragments of the allocator and buffers of libraries take the rest; assumed
)
ROLLING = (
    6  # states that a rollout holds beside the network's: the row, its last predictions, what is being made of them
)
COUNTED, ARITHMETIC = "counted", "arithmetic"
RULE = "sizing"  # of engine/sharding.py, which bench/training/ranks.py measures


class Part(NamedTuple):
    """bytes of one process; when: always, step or evaluation; source: counted, arithmetic, assumed, or where measured."""

    what: str
    bytes: float
    source: str
    when: str = "always"


class Memory(NamedTuple):
    """The parts, and the bytes of a card that they may take."""

    parts: tuple[Part, ...]
    limit: float

    def at(self, when: str) -> float:
        """Bytes of the parts of one kind."""
        return sum(p.bytes for p in self.parts if p.when == when)

    @property
    def most(self) -> float:
        """Bytes at the fullest moment."""
        return self.at("always") + max(self.at("step"), self.at("evaluation"))

    @property
    def fits(self) -> bool:
        """Whether that is within the limit."""
        return self.most <= self.limit

    def line(self) -> str:
        """One line for people: the parts that matter, and the verdict."""
        named = ", ".join(f"{gb(int(p.bytes))} {p.what}" for p in self.parts if p.bytes >= 0.005 * self.most)
        fits = "fits in" if self.fits else "MORE THAN"
        return (
            f"a process: {gb(int(self.most))} = {named}; {fits} the {gb(int(self.limit))} that are usable (predicted)"
        )


def of_stage(
    resolved: ResolvedStage, shape: tuple[int, ...], classes: int, known: dict[str, Network], choice: ShardingPlan,
    card: Card, processes: int,
) -> Memory:  # fmt: skip
    """The memory of a stage on one of `processes` cards. Raises ConfigError where rows do not divide over them."""
    run, stage = resolved.run, resolved.config
    bf16, p, rate = stage.half, known["student"].parameters, rate_of(stage)
    size = flops_.size(run.model, run.path, shape, classes)
    rows = stage.batch // processes // resolved.grad_accum_steps(processes)
    kept = activations.of_model(run.model, run.path, shape, classes, bf16)
    ratio, source = saved_ratio(known["student"], card, rate)
    wide = (
        rows * rounded.share(resolved, processes) * resolved.rows[0] / stage.batch
    )  # in fp32 whatever the precision is
    twice = activations.of_model(run.model, run.path, shape, classes, False).row - kept.row if wide else 0.0
    saved = rows * kept.row + wide * max(0.0, twice)
    made = 4 * size.remade + (
        2 * p if bf16 and choice.stage != 3 else 0
    )  # of weights, which the engine's step has already
    own = choice.peaks.rest + choice.teacher_bytes
    live = activations.working(run.model, run.path, shape, classes, bf16)
    parts = [
        Part("weights, gradients, optimizer and EMA", choice.peaks.rest, RULE),
        Part("buckets, casts and what else a step makes of weights", choice.peaks.step - own, RULE, "step"),
        Part("the averaged network", choice.peaks.evaluation - own, RULE, "evaluation"),
        Part("teacher and guide", choice.teacher_bytes, ARITHMETIC),
        Part(f"activations of {rows} rows", ratio * (saved + max(0.0, kept.fixed - made)), source, "step"),
        Part("forwards without gradient", rows * live, COUNTED, "step"),
        Part(f"samples, {run.eval.batch} at once", run.eval.batch * live, COUNTED, "evaluation"),
        *_teacher(resolved, shape, classes, known, choice, card, processes),
    ]
    named = sorted(stage.distances() & set(PERCEPTUAL))
    if named:
        of_image = activations.of_features(named[0], shape, run.features.width)
        parts.append(Part("feature network", 4 * known["features"].parameters, COUNTED))
        parts.append(Part("features of both images", 2 * of_image.bytes(rows), COUNTED, "step"))
    return Memory(tuple(p for p in parts if p.bytes), USABLE * card.memory)


def _teacher(
    resolved: ResolvedStage, shape: tuple[int, ...], classes: int, known: dict[str, Network], choice: ShardingPlan,
    card: Card, processes: int,
) -> list[Part]:  # fmt: skip
    """The teacher's copies in a lower precision, the pool of its trajectories, and what rolls them out."""
    stage, t = resolved.config, resolved.config.trajectories
    guide = stage.autoguidance
    pooled = bool(resolved.trajectory_rows and t)
    rolls = pooled and not resolved.cache
    named = ["teacher", *["guide"] * bool(guide and guide.trajectories)] if rolls else []
    if taught(stage.objective):
        named += [of for of in ("teacher", "guide") if of in known and of not in named]
    low = precision_of_teacher(resolved, card) if rolls else rate_of(stage)
    each = {"bf16": 2, "fp8": 1}.get(low, 0) if not choice.teacher_sharded else 0
    parts = [Part(f"teacher's copies in {low}", each * sum(known[of].parameters for of in named), ARITHMETIC)]
    if not pooled or t is None:
        return parts
    count, nodes = trajectories(resolved)
    row = 4 * math.prod(shape)
    parts.append(Part(f"pool of {count:,} trajectories", count * nodes * row, ARITHMETIC))
    if _keeps_features(stage):
        parts.append(Part("features of endpoints, at most", pool.KEEP_BYTES, ARITHMETIC))
    if rolls:
        at_once = min(t.rollout_batch, max(1, count // processes))
        models = [known[of].model or resolved.run.model for of in named if of in known]
        live = rollout_bytes(models, resolved, shape, classes, low in ("bf16", "fp8"))
        parts.append(Part(f"rollouts, {at_once:,} at once", at_once * live, COUNTED))
    return parts


def _keeps_features(stage) -> bool:
    """Whether a round keeps its endpoints' features, as train/batches.py decides it."""
    return bool(stage.perceptual and not stage.perceptual.augment and stage.trajectories)


def trajectories(resolved: ResolvedStage) -> tuple[int, int]:
    """Trajectories of a round of a stage's pool, over all processes, and nodes of each."""
    t = resolved.trajectories
    points = t.calls // (2 if t.solver == "heun" else 1)
    each = pool.drawn(t, resolved.run.path, points)
    return max(1, resolved.trajectory_rows * (1 if t.mode == "paper" else t.pool_steps) // each), points + 1


def precision_of_teacher(resolved: ResolvedStage, card: Card) -> str:
    """The precision of rollouts: of `auto`, which is measured when the stage begins, bf16 on a GPU and fp32 on a processor."""
    named, gpu = resolved.trajectories.precision, card.watts is not None
    if named == "auto":
        return "bf16" if gpu else "fp32"
    return rate_of(resolved.config) if named == "stage" else named


def rollout_bytes(
    models: list[Model], resolved: ResolvedStage, shape: tuple[int, ...], classes: int, bf16: bool
) -> float:
    """Bytes that one trajectory takes while it is rolled out by a teacher (and its guide), its nodes aside."""
    both = 2 if resolved.trajectories.guided else 1  # with and without label, in one batch
    live = max(activations.working(model, resolved.run.path, shape, classes, bf16) for model in models)
    return both * live + ROLLING * 4 * math.prod(shape)


def rows_that_fit(free: float, each: float) -> int:
    """Trajectories that a rollout may take at once, at least one."""
    return max(1, int(USABLE * free // each))


def saved_ratio(net: Network, card: Card, precision: str) -> tuple[float, str]:
    """Bytes that steps of DiTs were measured to save on such a card over those counted here; 1 where none was measured."""
    steps = [s for s in card.steps if s.saved and s.precision == precision] if net.depth else []
    own = [s for s in steps if (s.width, s.depth, s.tokens) == (net.width, net.depth, net.tokens)]
    ratios = []
    for s in own or steps:
        side = 2 * math.isqrt(s.tokens)
        count = activations.of_model(
            flops_.dit_model(s.width, s.depth), "linear", (4, side, side), 1000, precision == "bf16"
        )
        ratios.append(s.saved / count.bytes(s.batch))
    if not ratios:
        return 1.0, COUNTED
    factor = sum(ratios) / len(ratios)
    return factor, f"counted, times {factor:.3g} as measured: {(own or steps)[0].source}"
