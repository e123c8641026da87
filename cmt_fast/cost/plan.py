"""One dial: what of a recipe fits a budget on given cards, laid out so that it takes the fewest hours and fits in memory.

The search takes every layout that the cards have memory for (engine, activations kept or not, micro-batches) and the one
that costs the fewest hours. Where the whole recipe is still too long, changes of the method are made one after the other,
from the mildest, as long as one saves something; where that does not suffice, every stage gets the same share of its images.
All hours and bytes are those of `estimate`, so what a plan prints costs there what it costs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.cost import disk, estimate, levers, memory
from cmt_fast.cost.estimate import Rows, StageCost
from cmt_fast.cost.flops import AS_IT_RUNS, Network
from cmt_fast.cost.hardware import Card
from cmt_fast.cost.levers import Change
from cmt_fast.engine import ShardingPlan
from cmt_fast.engine.sharding import gb
from cmt_fast.run import validation
from cmt_fast.run.resolved import resolve

LEAST = 0.01  # of a recipe's images: a plan of fewer is refused, it would teach nothing
WORTH = 0.005  # of the hours that a change of the method must save


class Machine(NamedTuple):
    """`gpus` cards of a kind, and the data that they train on."""

    card: Card
    gpus: int
    rows: Rows


class StagePlan(NamedTuple):
    """One stage: what it costs, holds and writes. cache: a store of its trajectories, which only a plan of writing_hours has."""

    name: str
    cost: StageCost
    choice: ShardingPlan
    memory: memory.Memory
    micro_batch: int
    passes: int
    judged: disk.Judging
    judging_hours: float
    cache: disk.Cache | None
    writing_hours: float
    checkpoint_bytes: int

    @property
    def hours(self) -> float:
        """Of training, of judging, and of writing a cache before it."""
        return self.cost.hours + self.judging_hours + self.writing_hours


class Layout(NamedTuple):
    """A run as it would be trained, what of it differs from the recipe, and its stages."""

    run: Run
    changes: tuple[Change, ...]
    stages: tuple[StagePlan, ...]

    @property
    def hours(self) -> float:
        """On the clock, of all stages."""
        return sum(stage.hours for stage in self.stages)


class Plan(NamedTuple):
    """What fits `budget` hours on the clock. fraction: of the recipe's images.

    whole: the recipe's method and images laid out for the machine; full: its images with the plan's changes of the method;
    layout: with the images that fit. written: hours of the recipe as it is, None where that does not divide over the cards.
    """

    layout: Layout
    full: Layout
    whole: Layout
    budget: float
    fraction: float
    written: float | None


def plan(run: Run, names: list[str], machine: Machine, hours: float) -> Plan:
    """The plan of these stages in so many hours on the clock.

    Raises ConfigError where nothing fits the cards' memory, or less than LEAST of the images the hours.
    """
    networks = {name: estimate.networks(resolve(run, name), machine.rows)[0] for name in names}
    search = _Search(names, machine, networks)
    whole = found = _first(search, run, names)
    for change in levers.of_method(run, names, machine.card, machine.gpus):
        if found.hours <= hours:
            break
        tried = search.attempt(run, (*_of_method(found), change))
        if tried and tried.hours < (1 - WORTH) * found.hours:
            found = tried
    fraction, full = 1.0, found
    if found.hours > hours:
        fraction, found = _shortened(search, found, hours)
    return Plan(found, full, whole, hours, fraction, search.as_written(run))


def _judges_less(stage: StagePlan) -> bool:
    """Whether its evaluation holds less than its steps do, so that smaller ones would help nothing."""
    return stage.memory.at("evaluation") <= stage.memory.at("step")


def _first(search: _Search, run: Run, names: list[str]) -> Layout:
    """The recipe's own method laid out; its trajectories written to disk beforehand only where a teacher finds no room else."""
    try:
        return search.best(run, ())
    except ConfigError:
        written = tuple(levers.caches(run, names))
        found = search.attempt(run, written) if written else None
        if found is None:
            raise
        return found


def _of_method(layout: Layout) -> tuple[Change, ...]:
    return tuple(change for change in layout.changes if change.method)


def _shortened(search: _Search, layout: Layout, hours: float) -> tuple[float, Layout]:
    """The same share of every stage's images, the largest that the hours hold."""
    least = search.cut(layout, LEAST)
    if least.hours > hours:
        said = f"{hours:.3g} hours on {search.machine.gpus} x {search.machine.card.name}"
        raise ConfigError(
            f"budget: {said} hold less than {LEAST:.0%} of this recipe's images; that takes {least.hours:.3g} hours"
        )
    low, high, found = LEAST, 1.0, least
    for _ in range(40):  # hours never fall as images grow, but in steps: of whole batches and whole evaluations
        share = (low + high) / 2
        tried = search.cut(layout, share)
        low, high, found = (share, high, tried) if tried.hours <= hours else (low, share, found)
    return low, found


class _Search:
    """All layouts of a run's stages on a machine."""

    def __init__(self, names: list[str], machine: Machine, networks: dict[str, dict[str, Network]]) -> None:
        self.names, self.machine, self.networks = names, machine, networks

    def best(self, run: Run, method: tuple[Change, ...]) -> Layout:
        """The layout of the fewest hours; of as many that of the fewest passes, whose launches are not counted, and changes.

        Raises ConfigError where none fits.
        """
        tried = list(self._all(run, method))
        fitting = [layout for layout in tried if all(stage.memory.fits for stage in layout.stages)]
        if not fitting:
            raise self._too_large(tried)
        passes = lambda layout: sum(stage.passes for stage in layout.stages)
        return min(fitting, key=lambda layout: (float(f"{layout.hours:.4g}"), passes(layout), len(layout.changes)))

    def attempt(self, run: Run, method: tuple[Change, ...]) -> Layout | None:
        """The same, None where these changes do not go together with the recipe or with the cards."""
        try:
            changed = levers.applied(run, list(method))
            validation.check(changed, self.machine.rows.shape, self.machine.rows.classes)
            return self.best(run, method)
        except ConfigError:
            return None

    def as_written(self, run: Run) -> float | None:
        """Hours of the recipe as it is, whether it fits or not."""
        try:
            return sum(self._stage(run, name).hours for name in self.names)
        except ConfigError:
            return None

    def cut(self, layout: Layout, share: float) -> Layout:
        """The layout with a share of every stage's images, in whole batches."""
        changes = []
        for name in self.names:
            stage = layout.run.stages[name]
            if (t := stage.trajectories) and t.budget_forwards is not None:
                less = max(1, int(share * t.budget_forwards))
                why = f"{less / t.budget_forwards:.1%} of the recipe's, which the budget of hours holds"
                changes.append(Change(f"{name}.trajectories.budget_forwards", less, t.budget_forwards, why, True))
                continue
            images = max(1, int(share * stage.images_nimg) // stage.batch) * stage.batch
            why = f"{images / stage.images_nimg:.1%} of the recipe's, which the budget holds"
            changes.append(Change(f"{name}.images_nimg", images, stage.images_nimg, why, True))
        run = levers.applied(layout.run, changes)
        return Layout(run, (*layout.changes, *changes), tuple(self._stage(run, name) for name in self.names))

    def _all(self, run: Run, method: tuple[Change, ...]) -> Iterator[Layout]:
        for shared in levers.engines(run, self.machine.gpus):
            for kept in levers.recomputing(run):
                changes = [*method, *shared, *kept]
                laid, stages = levers.applied(run, changes), []
                for name in self.names:
                    more, stage = self._smaller(laid, name)
                    laid, changes = levers.applied(laid, more), [*changes, *more]
                    stages.append(stage)
                yield Layout(laid, tuple(changes), tuple(stages))

    def _smaller(self, run: Run, name: str) -> tuple[list[Change], StagePlan]:
        """A stage with the largest micro-batches and rollouts that fit; with the smallest where none does."""
        stage, refused = run.stages[name], None
        for batch in self._batches(stage.batch):
            why = f"{stage.batch} rows do not divide over {self.machine.gpus} processes"
            other = [Change(f"{name}.batch", batch, stage.batch, why, True)] if batch != stage.batch else []
            found = None
            for micro in self._micro(batch, stage.micro_batch):
                why = "the rows of one pass that fit in memory; a step adds their gradients"
                few = (
                    [Change(f"{name}.micro_batch", micro, stage.micro_batch, why, False)]
                    if micro != stage.micro_batch
                    else []
                )
                try:
                    found = self._rolled(run, name, [*other, *few])
                except ConfigError as error:
                    refused = refused or error
                    continue
                if found[1].memory.fits:
                    return found
            if found:
                return found
        assert refused is not None
        raise refused

    def _rolled(self, run: Run, name: str, changes: list[Change]) -> tuple[list[Change], StagePlan]:
        """A stage with these changes, and fewer samples and rollouts at once where only those are too many."""
        found = self._stage(levers.applied(run, changes), name)
        rolled = getattr(run.stages[name].trajectories, "rollout_batch", 1)
        rows = (
            ("eval.batch", run.eval.batch, "samples at once that fit in memory"),
            (f"{name}.trajectories.rollout_batch", rolled, "rollouts at once that fit in memory"),
        )
        for key, now, why in rows:
            size = now
            while not found.memory.fits and size > 1 and not (key == "eval.batch" and _judges_less(found)):
                size = max(1, size // 2)
                tried = [*changes, Change(key, size, now, why, False)]
                smaller = self._stage(levers.applied(run, tried), name)
                if smaller.memory.fits or size == 1:
                    changes, found = (tried, smaller) if smaller.memory.most < found.memory.most else (changes, found)
        return changes, found

    def _batches(self, batch: int) -> list[int]:
        """The recipe's, and those within a third of it that divide over the processes, the nearest first."""
        gpus = self.machine.gpus
        near = range(gpus, batch + batch // 3 + gpus, gpus)
        return [
            batch,
            *sorted((b for b in near if b >= batch - batch // 3 and b != batch), key=lambda b: abs(b - batch)),
        ]

    def _micro(self, batch: int, micro: int | None) -> list[int | None]:
        """Rows of a pass, from many to few; None: all of a process's in one pass, as the recipe has it."""
        each = batch // self.machine.gpus
        sizes = [n for n in range(each, 0, -1) if each % n == 0]
        return [micro, *(n for n in sizes if n < min(each, micro or each))]

    def _stage(self, run: Run, name: str) -> StagePlan:
        """A stage of a run as it is. Raises ConfigError where rows or trajectories do not divide over the cards."""
        resolved, known, (card, gpus, rows) = resolve(run, name), self.networks[name], self.machine
        cost, choice = estimate.bill_of(resolved, rows, known, card, gpus, AS_IT_RUNS)
        if resolved.trajectory_rows:
            count = memory.trajectories(resolved)[0]
            if count % gpus:
                raise ConfigError(
                    f"{count} trajectories do not divide over {gpus} processes", f"{name}.trajectories.pool_steps"
                )
        on_card = estimate.held(resolved, rows, known, choice, card, gpus)
        passes, judged = resolved.grad_accum_steps(gpus), disk.judging(resolved)
        hours = estimate.judging_hours(judged, known["student"], card, gpus)
        stored = disk.cache(resolved, tuple(rows.shape))
        writing = estimate.rolling_hours(resolved, known, card, gpus) if resolved.cache else 0.0
        micro = resolved.config.batch // gpus // passes
        saved = disk.checkpoints(resolved, known["student"].parameters)
        return StagePlan(name, cost, choice, on_card, micro, passes, judged, hours, stored, writing, saved)

    def _too_large(self, tried: list[Layout]) -> ConfigError:
        """What is lacking on the cards, of the layout that comes nearest."""
        near = min(tried, key=lambda layout: max(s.memory.most / s.memory.limit for s in layout.stages))
        worst = max(near.stages, key=lambda s: s.memory.most / s.memory.limit)
        held = sorted(worst.memory.parts, key=lambda part: -part.bytes)[0]
        most, limit, part = (gb(int(n)) for n in (worst.memory.most, worst.memory.limit, held.bytes))
        return ConfigError(
            f"--gpus: {self.machine.gpus} x {self.machine.card.name} do not hold {worst.name} of this recipe: a process needs "
            f"{most} at least, {part} of them {held.what}, and has {limit}; more cards or larger ones do"
        )
