"""What a grid says: the distance from a start over that of the same objective from `pre`, seed by seed, with intervals.

Distances are positive and their ratios matter, so all of it is done in logarithms. A pair has the seed, the judge's noise and
the equality in common. The interval of one objective is Student's over its seeds, 95 %, of which there are three: it is wide,
and knows nothing of other data. The pooled one is Student's over objectives, each a mean over its seeds: it speaks of objectives
like those of the shelf. A cell that failed, or samples that are not finite, is a loss without a number.

The claim that mid-training helps any flow map has four measures, both feature spaces at one and two steps. An objective
contradicts it where its interval lies above 1 in both spaces at the same number of steps; it agrees where both lie below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bench.grid.cells import ALONE, STARTS
from cmt_fast.evaluation import student

SPACES = ("frechet", "frechet_2")
STEPS = ("1", "2")
MEASURES = tuple((k, space) for k in STEPS for space in SPACES)
OTHERS = tuple(start for start in STARTS if start != "pre")

Rows = Sequence[dict[str, Any]]


class Effect(NamedTuple):
    """A ratio of distances and the ends of its 95 % interval, which are 0 and infinity for one pair; each: of every pair."""

    value: float
    low: float
    high: float
    each: tuple[float, ...]

    @property
    def says(self) -> str:
        """ "nearer", "farther" or "open"."""
        return "nearer" if self.high < 1 else "farther" if self.low > 1 else "open"


def effect(ratios: Iterable[float]) -> Effect | None:
    """Of ratios that are independent and alike; None without any."""
    each = tuple(ratios)
    if not each:
        return None
    logs, n = [math.log(r) for r in each], len(each)
    mean = sum(logs) / n
    if n == 1:
        return Effect(math.exp(mean), 0.0, math.inf, each)
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / (n - 1) / n)
    way = student.point(n - 1) * error
    return Effect(math.exp(mean), math.exp(mean - way), math.exp(mean + way), each)


class Table:
    """The rows of one grid, without those of questions."""

    def __init__(self, rows: Rows) -> None:
        own = [r for r in rows if not r["arm"]]
        self.by = {(_name(r), r["start"], r["equal"], r["seed"]): r for r in own}
        self.seeds = sorted({r["seed"] for r in own})
        self.names = sorted({_name(r) for r in own if r["kind"] != ALONE})
        self.path = {_name(r): r["path"] for r in own}

    def row(self, name: str, start: str, equal: str, seed: int) -> dict[str, Any] | None:
        """A cell's; that from `mid` is the same by both equalities."""
        return self.by.get((name, start, "images" if start == "mid" else equal, seed))

    def seeds_of(self, name: str) -> list[int]:
        """Those of which an objective has cells."""
        return sorted({seed for own, _, _, seed in self.by if own == name})

    def pairs(self, name: str, start: str, equal: str, k: str, space: str, over: str = "pre") -> list[float]:
        """Ratios to the start `over`, of every seed that has both."""
        found = [(self.row(name, start, equal, s), self.row(name, over, equal, s)) for s in self.seeds]
        both = [(a["steps"][k][space], b["steps"][k][space]) for a, b in found if _done(a) and _done(b)]
        return [a / b for a, b in both if a > 0 and b > 0]

    def effect(self, name: str, start: str, equal: str, k: str, space: str) -> Effect | None:
        """Over seeds."""
        return effect(self.pairs(name, start, equal, k, space))

    def beyond_alone(self, name: str, start: str, k: str, space: str) -> Effect | None:
        """Over mid-training alone for as many images, over seeds."""
        found = []
        for seed in self.seeds:
            alone = self.row(f"{ALONE}@{self.path[name]}", "pre", "images", seed)
            own = self.row(name, start, "images", seed)
            if _done(own) and _done(alone):
                found.append(own["steps"][k][space] / alone["steps"][k][space])
        return effect(found)

    def failures(self, name: str, start: str, equal: str) -> int:
        """Seeds whose cell has no figures."""
        found = (self.row(name, start, equal, s) for s in self.seeds)
        return sum("failed" in r for r in found if r)

    def pooled(self, start: str, equal: str, k: str, space: str) -> Effect | None:
        """Over objectives, each the mean of its seeds."""
        found = (self.effect(name, start, equal, k, space) for name in self.names)
        return effect(e.value for e in found if e)

    def says(self, name: str, start: str, equal: str, k: str) -> str:
        """Of one objective by both spaces: "nearer", "farther", "open" or, where they contradict each other, "apart"."""
        if self.failures(name, start, equal) and not self.failures(name, "pre", equal):
            return "farther"
        found = [self.effect(name, start, equal, k, space) for space in SPACES]
        said = {e.says for e in found if e}
        if said == {"nearer", "farther"}:
            return "apart"
        return said.pop() if len(said) == 1 and all(found) else "open"

    def sorted(self, start: str, equal: str, worst: Callable[[float], float] = lambda x: -x) -> list[str]:
        """Objectives, those that lose the most first; those that failed before them."""
        return sorted(
            self.names, key=lambda name: (-self.failures(name, start, equal), worst(self.mean(name, start, equal)))
        )

    def mean(self, name: str, start: str, equal: str) -> float:
        """The mean logarithm of the four ratios; 0 where nothing is measured."""
        found = [e for k, space in MEASURES if (e := self.effect(name, start, equal, k, space))]
        return sum(math.log(e.value) for e in found) / len(found) if found else 0.0


class Arms:
    """The arms of one question and path. The reference is the arm that changes nothing, the grid's cell, else the first."""

    def __init__(
        self, data: dict[str, Any], question: str, kind: str, path: str, arms: dict[str, tuple[str, ...]]
    ) -> None:
        self.order = list(arms)
        self.reference = next((arm for arm, more in arms.items() if not more), self.order[0])
        own = [
            r for r in data["rows"] if (r["kind"], r["path"], r["start"], r["equal"]) == (kind, path, "mid", "images")
        ]
        self.mids = {(s["key"], s["seed"]): s for s in data["shared"] if s["stage"] == "mid"}
        self.by = {
            arm: {r["seed"]: r for r in own if r["arm"] == (labelled(question, arm) if more else "")}
            for arm, more in arms.items()
        }

    def rows(self, arm: str) -> list[dict[str, Any]]:
        """Of all seeds, in order."""
        return [row for _, row in sorted(self.by[arm].items())]

    def effect(self, arm: str, k: str, space: str, after: str) -> Effect | None:
        """Over the reference, seed by seed; after: "mid" or "post"."""
        if arm == self.reference:
            return None
        both = [(own, self.by[self.reference][s]) for s, own in self.by[arm].items() if s in self.by[self.reference]]
        pairs = [(self._figures(a, after), self._figures(b, after)) for a, b in both]
        return effect(a[k][space] / b[k][space] for a, b in pairs if a and b)

    def _figures(self, row: dict[str, Any], after: str) -> dict[str, Any] | None:
        if after == "mid":
            row = self.mids.get(((row["parent"] or "").rpartition("-")[2], row["seed"])) or {}
        return row.get("steps")

    def forwards(self, arm: str) -> str:
        """Thousands: the teacher's, and all."""
        rows = self.rows(arm)
        if not rows:
            return ""
        return f"{rows[0]['forwards']['teacher'] / 1e3:.0f}, {sum(rows[0]['forwards'].values()) / 1e3:.0f}"


def labelled(question: str, arm: str) -> str:
    """What a cell of this arm is called."""
    return f"{question}-{arm.replace(' ', '_').replace(',', '')}"


def _name(row: dict[str, Any]) -> str:
    """KIND@PATH."""
    return f"{row['kind']}@{row['path']}"


def _done(row: dict[str, Any] | None) -> bool:
    return row is not None and "steps" in row
