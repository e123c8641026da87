"""The learning rate of an objective from each start, by the same number of tries on a seed that no table shows.

Two rates, a factor of four apart, and a third a factor of four beyond the better one. The least mean of the logarithms of both
distances at one and two steps wins. It is searched from `pre` and from `mid`, by as many tries each: the control is not to be
weak. `scratch` takes the rate of `pre`, `anchored` that of `mid`. A rate of the edge is said to be one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.grid.cells import Cell
from bench.grid.machine import Machine

SEED = 100
FIRST, FACTOR = (2e-4, 8e-4), 4.0
SEARCHED = {"scratch": "pre", "pre": "pre", "mid": "mid", "anchored": "mid"}  # from which start
ALONE_LR = 1e-3  # of mid-training: the recipes' own


def tuned(machine: Machine, suite: str, kind: str, path: str, start: str) -> dict[str, Any]:
    """The rate and all that was tried: {"kind", "path", "start", "lr", "edge", "tries": [{"lr", "score"}]}."""
    start = SEARCHED[start]
    tries = [tried(machine, Cell(suite, kind, path, start, "images", SEED, lr)) for lr in FIRST]
    beyond = third(tries)
    tries.append(tried(machine, Cell(suite, kind, path, start, "images", SEED, beyond)))
    best = min(tries, key=lambda t: t["score"])
    return {"kind": kind, "path": path, "start": start, "lr": best["lr"], "edge": best["lr"] == beyond, "tries": tries}


def third(tries: Sequence[dict[str, Any]]) -> float:
    """The rate beyond the better of two; where neither is finite the lower one."""
    low, high = tries
    return low["lr"] / FACTOR if low["score"] <= high["score"] else high["lr"] * FACTOR


def tried(machine: Machine, cell: Cell) -> dict[str, Any]:
    """One try; a score that is not finite is one that failed."""
    return {"lr": cell.lr, "score": score(machine.measure(cell))}


def score(row: dict[str, Any]) -> float:
    """The mean logarithm of both distances at every number of steps."""
    if "failed" in row:
        return math.inf
    logs = [math.log(own[key]) for own in row["steps"].values() for key in ("frechet", "frechet_2")]
    return sum(logs) / len(logs)
