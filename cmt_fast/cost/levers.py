"""What a plan may turn: settings that only lay the work out otherwise, and those that change what is computed.

A layout (micro-batch, ZeRO's stage, activations kept or not, rows of a rollout at once) leaves the method as it is. A
change of the method is named with its reason, and made only where the budget does not reach the whole recipe without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from cmt_fast.config.schema import CmtCm, CmtMf, Run, Stage
from cmt_fast.cost.hardware import Card, rate_of
from cmt_fast.run.resolved import resolve

FASTER = 1.2  # times as fast as its own precision bf16 products must be on a card to be worth a change
ROUNDS = 8  # times as many steps from a round of the pool as the recipe has, at most


class Change(NamedTuple):
    """A key that the plan sets otherwise than the recipe. method: it changes what is computed, not only how."""

    key: str
    value: Any
    was: Any
    why: str
    method: bool

    @property
    def override(self) -> str:
        """As the command line takes it."""
        return f"{self.key}={self.value if isinstance(self.value, str) else json.dumps(self.value)}"


def applied(run: Run, changes: list[Change]) -> Run:
    """The run with these keys."""
    for change in changes:
        run = _with(run, change.key.split("."), change.value)
    return run


def _with(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


def engines(run: Run, gpus: int) -> Iterator[list[Change]]:
    """How the states may lie on the cards: the recipe's way first, then from fast to small."""
    yield []
    if gpus == 1:
        if run.engine != "local":
            yield [Change("engine", "local", run.engine, "one process has nothing to share", False)]
        return
    if run.engine != "local":
        why = "every process holds everything, and its step is a CUDA graph that waits for no host"
        yield [Change("engine", "local", run.engine, why, False)]
    base = (
        [Change("engine", "zero", run.engine, "states are shared over the cards", False)]
        if run.engine != "zero"
        else []
    )
    for stage in (1, 2, 3):
        why = f"the least communication whose states leave room; stage {stage} of ZeRO"
        found = [*base, Change("zero_stage", stage, run.zero_stage, why, False)]
        if stage != run.zero_stage:
            yield found
        if stage == 3 and run.zero_teacher != "sharded":
            yield [
                *found,
                Change("zero_teacher", "sharded", run.zero_teacher, "the teacher lies over the cards too", False),
            ]


def recomputing(run: Run) -> Iterator[list[Change]]:
    """Activations kept, and made again; the recipe's way where the model has no such choice."""
    key, now = "model.checkpoint_activations", getattr(run.model, "checkpoint_activations", None)
    if now is None:
        yield []
        return
    for value, why in ((False, "activations fit, so no forward runs twice"), (True, "activations do not fit")):
        yield [] if value == now else [Change(key, value, now, why, False)]


def caches(run: Run, names: list[str]) -> Iterator[Change]:
    """Trajectories that are written before their stage begins, whose teacher then need not lie beside the student."""
    for name in names:
        t = run.stages[name].trajectories
        if t and not t.cache and t.nfe != "auto" and resolve(run, name).trajectory_rows:
            why = "the teacher finds no room beside the student; `cmt trajectories` writes them first, in fp16"
            yield Change(f"{name}.trajectories.cache", f"runs/{run.name}-{name}-trajectories", None, why, True)


def of_method(run: Run, names: list[str], card: Card, gpus: int) -> Iterator[Change]:
    """Changes of what is computed that save time, from the mildest: precision, rounds of the pool, points of a trajectory."""
    for name in names:
        stage = run.stages[name]
        if stage.products != "bf16" and gains(stage, card) and isinstance(stage.objective, (CmtCm, CmtMf)):
            why = "its targets are fixed, and products in bf16 are faster on this card"
            yield Change(f"{name}.precision", "bf16", stage.precision, why, True)
    for name in names:
        t = run.stages[name].trajectories
        if t and t.mode == "pool" and resolve(run, name).trajectory_rows and not t.cache and card.watts is not None:
            why = "more trajectories in a round fill the teacher's calls; the points are drawn in another order"
            yield Change(f"{name}.trajectories.pool_steps", ROUNDS * t.pool_steps, t.pool_steps, why, True)
    for name in names:
        t = run.stages[name].trajectories
        points = t.calls // (2 if t.solver == "heun" else 1) if t else 0
        if t and t.mode == "pool" and t.per_trajectory < points and not t.cache and resolve(run, name).trajectory_rows:
            why = f"all {points} points of a trajectory are used, as published, so that fewer are rolled out"
            yield Change(f"{name}.trajectories.per_trajectory", points, t.per_trajectory, why, True)


def gains(stage: Stage, card: Card) -> bool:
    """Whether bf16 products are worth a change for a stage on a card."""
    return card.matmul["bf16"] >= FASTER * card.matmul[rate_of(stage)]
