"""What a stage that ran out of memory holds, part by part, and which settings would fit: by the run's own arithmetic.

The arithmetic (cost/memory.py) is a prediction and has been refuted where it says that what just failed fits. Then a setting
must come out below what it says of the failed one by MARGIN. Settings are tried from the one that costs least: those that only
lay the same work out otherwise (levers.py) come first. Each is tried alone, then all of them together, one after the other,
until that fits. A run that has begun goes on with some of them alone: those are named first, and of the others it is said that
they need a new folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cmt_fast.config import fingerprint
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.cost import estimate, levers, memory
from cmt_fast.cost.estimate import Rows
from cmt_fast.cost.hardware import Card
from cmt_fast.cost.levers import Change
from cmt_fast.engine.sharding import gb
from cmt_fast.run.resolved import resolve

Found = tuple[list[Change], memory.Memory]  # changes, and what the stage holds with them
MARGIN = 0.1  # of what the arithmetic says of the settings that failed
NAMED = 0.03  # parts of less than this of the whole are not named
WHENS = {"a step": "step", "an evaluation": "evaluation"}  # moments of which parts are there alone


class Case(NamedTuple):
    """A stage of a run on `processes` devices that ran out of memory; card: with the bytes that one process may have.

    begun: stages that have checkpoints, in whose folder no setting may change that weights depend on.
    """

    run: Run
    stage: str
    rows: Rows
    card: Card
    processes: int
    begun: tuple[str, ...] = ()

    def goes_on(self, changes: list[Change]) -> bool:
        """Whether the run goes on in its folder with these changes."""
        run = levers.applied(self.run, changes)
        return all(fingerprint.content(run, name) == fingerprint.content(self.run, name) for name in self.begun)

    def held(self, run: Run) -> memory.Memory:
        """What the stage holds by the settings of a run. Raises ConfigError where it cannot be trained so."""
        resolved = resolve(run, self.stage)
        known, _ = estimate.networks(resolved, self.rows)
        choice = estimate.sharding_plan(resolved, self.rows, known, self.card, self.processes)
        return estimate.held(resolved, self.rows, known, choice, self.card, self.processes)


class Bound(NamedTuple):
    """What fits: at most `then` bytes at the moment that failed (step, evaluation, or of what is always there), and `ever`."""

    moment: str
    then: float
    ever: float

    def fits(self, held: memory.Memory) -> bool:
        """Whether that is so."""
        return held.at("always") + held.at(self.moment) <= self.then and held.most <= self.ever

    def sum(self, held: memory.Memory) -> float:
        """What is the less the better for either."""
        return held.at("always") + held.at(self.moment) + held.most


def told(case: Case, when: str) -> str:
    """The parts at the moment that it failed, and the settings that would fit. when: as of OutOfMemory.moment."""
    now, moment = case.held(case.run), WHENS.get(when, "")
    lasting = [p for p in now.parts if p.when in ("always", moment)]
    most = sum(p.bytes for p in lasting)
    parts = ", ".join(
        f"{gb(int(p.bytes))} {p.what}" for p in sorted(lasting, key=lambda p: -p.bytes) if p.bytes >= NAMED * most
    )
    bound = Bound(moment, min(now.limit, (1 - MARGIN) * most), now.limit)
    wrong = ", which should fit and does not" if most <= now.limit else ""
    text = f"by its arithmetic a process holds {gb(int(most))} ({parts}) of {gb(int(now.limit))}{wrong}"
    found = list(settings(case, bound))
    if found:
        return f"{text}. These would fit: {'; or '.join(found)}"
    more = more_processes(case, bound)
    if more:
        fewest, changes = more
        named = _named(case, changes)
        return f"{text}. No setting fits on {case.processes}; {named} on {fewest} processes would"
    return f"{text}. No setting fits such a device: take a smaller model"


def settings(case: Case, bound: Bound) -> Iterator[str]:
    """Overrides by which the stage fits, each with what it then holds at most: each kind alone, where the run goes on with none
    of these as many as it takes.
    """
    now, kinds, found = _held(case, case.run), list[list[list[Change]]](), list[Found]()
    for tries in _tries(case):
        possible = [(changes, sized) for changes in tries if (sized := _held(case, levers.applied(case.run, changes)))]
        first = next((pair for pair in possible if bound.fits(pair[1])), None)
        if first:
            found.append(first)
        elif now and possible and bound.sum(possible[-1][1]) < bound.sum(now):
            kinds.append([changes for changes, _ in possible])
    if not any(case.goes_on(changes) for changes, _ in found):
        found = [*_together(case, bound, [tries for tries in kinds if case.goes_on(tries[-1])]), *found]
    for changes, sized in sorted(found or _together(case, bound, kinds), key=lambda pair: not case.goes_on(pair[0])):
        yield _named(case, changes, f" ({gb(int(sized.most))})")


def _together(case: Case, bound: Bound, kinds: list[list[list[Change]]]) -> Iterator[Found]:
    """As many kinds as it takes at their strongest, then each as mild as the others let it be; nothing where all do not fit."""
    held = lambda chosen: _held(case, levers.applied(case.run, [c for changes in chosen for c in changes]))
    fits = lambda chosen: bool((sized := held(chosen)) and bound.fits(sized))
    strongest = [tries[-1] for tries in kinds]
    n = next((n for n in range(1, len(kinds) + 1) if fits(strongest[:n])), 0)
    chosen = strongest[:n]
    for i, tries in enumerate(kinds[:n]):
        chosen[i] = next(changes for changes in tries if fits([*chosen[:i], changes, *chosen[i + 1 :]]))
    sized = held(chosen) if n else None
    if sized:
        yield [c for changes in chosen for c in changes], sized


def more_processes(case: Case, bound: Bound) -> tuple[int, list[Change]] | None:
    """The fewest processes, by doubling, on which stage 3 with everything sharded fits, and by what; recomputed where it must."""
    run, why = case.run, "states are shared over the cards"
    values = (("engine", "zero"), ("zero_stage", 3), ("zero_teacher", "sharded"))
    sharded = [Change(key, value, getattr(run, key), why, False) for key, value in values]
    again = [changes for changes in levers.recomputing(run) if changes and changes[-1].value is True]
    tried = sorted([[], *again], key=lambda changes: not case.goes_on(changes))
    n = 2 * case.processes
    while n <= 1024:
        wider, key = case._replace(processes=n), f"{case.stage}.micro_batch"
        for more in tried:
            for rows in _divisors(case, n):
                changes = [*sharded, *more, Change(key, rows, None, "", False)]
                held = _held(wider, levers.applied(run, changes))
                if held is not None and bound.fits(held):
                    return n, changes
        n *= 2
    return None


def _tries(case: Case) -> Iterator[list[list[Change]]]:
    """Kinds of settings, each a list from the one that costs least to the one that saves most."""
    run, name = case.run, case.stage
    stage = run.stages[name]
    passes = [Change(f"{name}.micro_batch", n, stage.micro_batch, "", False) for n in _divisors(case, case.processes)]
    yield [[change] for change in passes]
    yield [[c] for c in (Change("eval.batch", n, run.eval.batch, "", False) for n in _halves(run.eval.batch))]
    t = stage.trajectories
    if t and not t.cache:
        yield [
            [Change(f"{name}.trajectories.rollout_batch", n, t.rollout_batch, "", False)]
            for n in _halves(t.rollout_batch)
        ]
    if case.processes > 1:
        yield [changes for changes in levers.engines(run, case.processes) if _shards(changes)]
    yield [changes for changes in levers.recomputing(run) if changes and changes[-1].value is True]
    if t and t.mode == "pool" and not t.cache:
        steps = _halves(t.pool_steps)
        yield [[Change(f"{name}.trajectories.pool_steps", n, t.pool_steps, "", True)] for n in steps]


def _shards(changes: list[Change]) -> bool:
    return any(change.key == "zero_stage" for change in changes)


def _divisors(case: Case, processes: int) -> list[int]:
    """Rows of a pass that divide a process's, fewer than it has now, from the most."""
    stage = case.run.stages[case.stage]
    each = stage.batch // processes
    now = min(stage.micro_batch or each, each) if processes == case.processes else each + 1
    return [n for n in range(now - 1, 0, -1) if each % n == 0]


def _halves(n: int) -> list[int]:
    out = []
    while n > 1:
        n //= 2
        out.append(n)
    return out


def _held(case: Case, run: Run) -> memory.Memory | None:
    """What the stage holds by these settings; None where it cannot be trained so."""
    try:
        return case.held(run)
    except ConfigError:
        return None


def _named(case: Case, changes: list[Change], more: str = "") -> str:
    """Overrides as the command line takes them."""
    text = " ".join(change.override for change in changes) + more
    return text if case.goes_on(changes) else f"{text} in a new folder"
