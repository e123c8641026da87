"""What was measured of mid-training's own settings, beside a recipe's: a plan prints it, and takes nothing of it by itself.

`python -m bench grid SUITE --question NAME` asks, and writes advice.json: for each question and objective the value that is
advised, and its distance over that of every other value, a mean over one and two steps and two feature spaces with an interval
over seeds. A recipe is told where its own value is another one that was measured, and the advised one is nearer or costs less.
On other data and at another size that may be wrong, so every line says what it was measured on.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.schema import Run

FILE = Path(__file__).with_name("advice.json")
SHARE = "share"  # a key of no recipe: of the images of mid- and post-training, those of mid-training
ROUGHLY = math.log(1.25)  # within which two shares are one
LEAST_SAVED = 0.05  # of forwards, for which a value that is not told apart is worth a line


class Line(NamedTuple):
    """What a recipe is told: the key with the value that was found, its own, and why."""

    key: str
    value: Any
    was: Any
    why: str


@functools.cache
def measured() -> tuple[dict[str, Any], ...]:
    """What comes with the package."""
    return tuple(json.loads(FILE.read_text("utf-8")))


def lines(run: Run, found: Sequence[Mapping[str, Any]] | None = None) -> list[Line]:
    """What this recipe's mid-training is told. found: what was measured, by default what comes with the package."""
    out = []
    for row in measured() if found is None else found:
        if row["path"] != run.path or not run.mid.trajectories:
            continue
        was = own(run, row["key"])
        mine = next((arm for arm in row["arms"] if _same(arm["value"], was)), None)
        if mine is None or _same(row["advised"], was):
            continue
        value, low, high = mine["ratio"]
        cost = row["forwards"] / mine["forwards"]
        if high >= 1 and cost > 1 - LEAST_SAVED:
            continue
        key, best = row["key"], row["advised"]
        if key == SHARE:
            images, batch = run.mid.images_nimg + run.post.images_nimg, run.mid.batch
            key, was, best = "mid.images_nimg", run.mid.images_nimg, max(1, round(best * images / batch)) * batch
        said = f"{value:.2g} times the distance [{low:.2g}, {high:.2g}] at {cost:.2g} times the forwards"
        where = f"{row['objective']} on {row['suite']}, {row['seeds']} seeds of a small network"
        out.append(Line(key, best, was, f"{said}; {where}"))
    return out


def price(path: str, key: str, was: Any, value: Any, found: Sequence[Mapping[str, Any]] | None = None) -> str:
    """What another value of a key costs in distance, where it was measured of mid-training; else nothing. An anchor's
    trajectories are taken for mid-training's."""
    key = key.replace("post.", "mid.", 1)
    for row in measured() if found is None else found:
        if (row["path"], row["key"]) != (path, key):
            continue
        for arm in row["arms"]:
            ends = arm["ratio"]
            if (row["advised"], arm["value"]) == (was, value):
                ends = [1 / ends[0], 1 / ends[2], 1 / ends[1]]
            elif (row["advised"], arm["value"]) != (value, was):
                continue
            ratio, low, high = ends
            where = f"{row['objective']} on {row['suite']}, {row['seeds']} seeds of a small network"
            return f"{ratio:.2g} times the distance [{low:.2g}, {high:.2g}] in {where}"
    return ""


def own(run: Run, key: str) -> Any:
    """The recipe's value of a key of its mid-training."""
    if key == SHARE:
        return run.mid.images_nimg / (run.mid.images_nimg + run.post.images_nimg)
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _same(value: Any, was: Any) -> bool:
    if isinstance(value, float) and isinstance(was, float) and value > 0 and was > 0:
        return abs(math.log(value / was)) < ROUGHLY
    return bool(value == was)
