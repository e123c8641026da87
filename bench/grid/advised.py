"""What a grid's questions say to a recipe, written to cmt_fast/cost/advice.json, where `cmt plan` reads it.

The arm that is advised is the cheapest of those that the nearest one is not told apart from, after post-training: by Student's
interval, over seeds, of the mean logarithm of both distances at one and two steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.grid import questions
from bench.grid.judged import MEASURES, Arms, Effect, effect
from bench.harness.results_file import write_json
from cmt_fast.cost import advice

Rows = list[dict[str, Any]]


def write(data: dict[str, Any], file: Path = advice.FILE) -> Path:
    """Put in what these data say, in the place of what the same suite said before."""
    kept = [row for row in json.loads(file.read_text("utf-8")) if row["suite"] != data["suite"]]
    write_json(file, kept + found(data))
    return file


def found(data: dict[str, Any]) -> Rows:
    """A row for each question and path of which at least two arms have the same seeds, two of them or more."""
    out = []
    for name, question in questions.QUESTIONS.items():
        for path, kind in questions.KINDS.items():
            arms = Arms(data, name, kind, path, question.arms(data["suite"], path))
            key, values = question.values(data["suite"], path)
            row = _row(arms, values)
            if row:
                out.append(
                    {"suite": data["suite"], "objective": kind, "path": path, "question": name, "key": key, **row}
                )
    return out


def _row(arms: Arms, values: dict[str, Any]) -> dict[str, Any] | None:
    """values: of the key, by arm; arms without one advise nothing."""
    logs = {arm: _logs(arms.rows(arm)) for arm in arms.order if arm in values}
    seeds = set.intersection(*(set(own) for own in logs.values() if own)) if any(logs.values()) else set()
    logs = {arm: own for arm, own in logs.items() if own}
    if len(logs) < 2 or len(seeds) < 2:
        return None
    each = {arm: [own[seed] for seed in sorted(seeds)] for arm, own in logs.items()}
    cost = {arm: sum(arms.rows(arm)[0]["forwards"].values()) for arm in logs}
    best = cheapest(each, cost)
    others = [
        {"value": values[arm], "forwards": cost[arm], "ratio": [round(x, 4) for x in over(each[best], own)[:3]]}
        for arm, own in each.items()
        if arm != best
    ]
    return {"seeds": len(seeds), "advised": values[best], "forwards": cost[best], "arms": others}


def _logs(rows: Rows) -> dict[int, float]:
    """Seed -> the mean logarithm of the four distances."""
    return {
        r["seed"]: sum(math.log(r["steps"][k][space]) for k, space in MEASURES) / len(MEASURES)
        for r in rows
        if "steps" in r
    }


def over(a: Sequence[float], b: Sequence[float]) -> Effect:
    """Of logarithms, seed by seed."""
    ratio = effect(math.exp(x - y) for x, y in zip(a, b, strict=True))
    assert ratio is not None
    return ratio


def cheapest(each: dict[str, list[float]], cost: dict[str, float]) -> str:
    """The arm of the fewest forwards among those that the nearest is not told apart from, of as many the nearer."""
    mean = {arm: sum(own) / len(own) for arm, own in each.items()}
    near = min(each, key=mean.__getitem__)
    alike = [arm for arm in each if arm == near or over(each[near], each[arm]).high >= 1]
    return min(alike, key=lambda arm: (cost[arm], mean[arm]))
