"""What was measured of mid-training's own settings, beside a recipe's: a plan prints it, and takes nothing of it by itself.

`python -m bench grid SUITE --question NAME` asks, and writes advice.json: for each question and objective the value that is
advised, and its distance over that of every other value, a mean over one and two steps and two feature spaces with a 95 %
interval over seeds. The advised value is the cheapest of those that are not told apart from the nearest one: where every
interval holds 1 nothing was decided but the price, and a plan says so. It has a line for every question: for those too that
nobody has asked yet, that were not asked of the recipe's own value, or whose answer this recipe cannot take.

A recipe is told another value where its own is one that was measured, and the advised one is nearer or costs less. All of it is
of small networks on small data. For others it is a guess, so a line says what it was measured on.

Solver and calls need no guess: `nfe: auto` measures them on the run itself, under a budget by the bound on the gradient's bias.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.schema import Run
from cmt_fast.run.resolved import resolve

FILE = Path(__file__).with_name("advice.json")
SHARE = "share"  # a key of no recipe: of the images of mid- and post-training, those of mid-training
ROUGHLY = math.log(1.25)  # within which two shares are one
LEAST_SAVED = 0.05  # of forwards, for which a value that is not told apart is worth a line
# what the grid asks (bench/grid/questions.py), in words; a question that is no key of mid-training has no line but this
ASKED = {
    "points": "points of a trajectory",
    "pool": "steps from one round of trajectories",
    "solver": "the solver",
    "calls": "calls a trajectory",
    "end": "the ends of time",
    "length": "mid-training's share of the images",
    "teacher": "how good a teacher",
    "guided": "a guided teacher",
}
NO_KEY = ("teacher",)
NOTHING: Callable[[str, Any], str] = lambda key, value: ""


class Line(NamedTuple):
    """What a recipe is told: the key with the value that was found, its own, and why."""

    key: str
    value: Any
    was: Any
    why: str


class Answer(NamedTuple):
    """Of one question: its state in a word, the same in words, and the line where another value is told.

    state: "advised" (another value is nearer), "cheaper" (another one is not told apart and costs less), "kept" (the recipe has
    the advised one, or one that nothing speaks against), "unmeasured", "inapplicable".
    """

    question: str
    state: str
    text: str
    line: Line | None = None


@functools.cache
def measured() -> tuple[dict[str, Any], ...]:
    """What comes with the package."""
    return tuple(json.loads(FILE.read_text("utf-8")))


def lines(run: Run, found: Sequence[Mapping[str, Any]] | None = None) -> list[Line]:
    """What this recipe's mid-training is told. found: what was measured, by default what comes with the package."""
    return [answer.line for answer in answers(run, found) if answer.line]


def answers(
    run: Run, found: Sequence[Mapping[str, Any]] | None = None, refused: Callable[[str, Any], str] = NOTHING
) -> list[Answer]:
    """Each question's answer for this recipe, and of those that nobody has asked that. refused: why a key cannot have a value in
    this recipe, "" where it can."""
    rows = [row for row in (measured() if found is None else found) if row["path"] == run.path]
    out = []
    for name in dict.fromkeys((*ASKED, *(row["question"] for row in rows))):
        mine = [row for row in rows if row["question"] == name]
        if why := bars(run, name):
            out.append(Answer(name, "inapplicable", why))
        elif mine:
            out += [_answer(run, row, refused) for row in mine]
        else:
            out.append(Answer(name, "unmeasured", f"not measured on the path {run.path}"))
    return out


def bars(run: Run, question: str) -> str:
    """Why a question is none of this recipe's, "" where it is."""
    t = run.mid.trajectories
    if question in NO_KEY:
        return "is no key of mid-training; docs/grid.md has what was measured"
    if t is None:
        return "mid-training has no trajectories"
    if question == "length":
        return "its length follows from trajectories.budget_forwards" if t.budget_forwards is not None else ""
    if t.cache:
        return f"trajectories are read from {t.cache}, which has its own"
    if question in ("solver", "calls") and t.nfe == "auto":
        rule = "the student's own error" if t.budget_forwards is None else "the bound on the gradient's bias"
        return f"nfe is auto: chosen on the run itself, by {rule}, when the stage begins; counted here with {t.calls}"
    if question in ("points", "pool") and t.mode == "paper":
        return "mode is paper: every step has trajectories of its own and all their points"
    if question in ("solver", "end") and t.solver == "jump":
        return "the teacher is a flow map, whose jumps have no order and no grid of an ODE"
    if question == "guided" and run.pre is not None and run.mid.teacher == "pre" and not run.pre.label_dropout:
        return "pre.label_dropout is 0: the teacher does not know what there is without a label"
    return ""


def by_measurement(run: Run) -> str:
    """The overrides under which mid-training's solver, calls and length are chosen on the run itself, at the forwards that it has
    now; "" where they are, or cannot be."""
    t = run.mid.trajectories
    if t is None or t.cache or t.nfe == "auto" or t.budget_forwards is not None:
        return ""
    stage = resolve(run, "mid")
    forwards = round(stage.config.images_nimg * stage.forwards(t.solver, t.calls))
    return f"mid.trajectories.nfe=auto mid.trajectories.budget_forwards={forwards}"


def _answer(run: Run, row: Mapping[str, Any], refused: Callable[[str, Any], str]) -> Answer:
    """Of one row."""
    name, key, best, was = row["question"], row["key"], row["advised"], own(run, row["key"])
    where = f"{row['objective']} on {row['suite']}, {row['seeds']} seeds of a small network"
    if _same(best, was):
        return Answer(name, "kept", f"{shown(key, was)} is what is advised: {_beside(row)}; {where}")
    mine = next((arm for arm in row["arms"] if _same(arm["value"], was)), None)
    if mine is None:
        others = ", ".join(shown("", v) for v in sorted((best, *(arm["value"] for arm in row["arms"])), key=_order))
        return Answer(name, "unmeasured", f"{shown(key, was)} was not measured, {others} were ({where})")
    value, low, high = mine["ratio"]
    cost = row["forwards"] / mine["forwards"]
    said = f"{value:.2g} times the distance [{low:.2g}, {high:.2g}] at {cost:.2g} times the forwards"
    if high >= 1 and cost > 1 - LEAST_SAVED:
        return Answer(name, "kept", f"{shown(key, was)} and {shown('', best)} are not told apart: {said}; {where}")
    if key == SHARE:
        images, batch = run.mid.images_nimg + run.post.images_nimg, run.mid.batch
        key, was, best = "mid.images_nimg", run.mid.images_nimg, max(1, round(best * images / batch)) * batch
    if why := refused(key, best):
        return Answer(name, "inapplicable", f"{shown(key, best)}, {said} ({where}), cannot be had here: {why}")
    state, apart = ("advised", "") if high < 1 else ("cheaper", ", which is not told apart and costs less")
    return Answer(
        name, state, f"{shown(key, best)} (this plan's: {shown('', was)}): {said}{apart}; {where}",
        Line(key, best, was, f"{said}; {where}"),
    )  # fmt: skip


def _beside(row: Mapping[str, Any]) -> str:
    """Which other values the advised one is nearer than, and which it is not told apart from."""
    nearer = [shown("", arm["value"]) for arm in row["arms"] if arm["ratio"][2] < 1]
    open_ = [shown("", arm["value"]) for arm in row["arms"] if arm["ratio"][2] >= 1]
    parts = [f"nearer than {', '.join(nearer)}"] * bool(nearer)
    parts += [f"not told apart from {', '.join(open_)}, and no dearer than those as near"] * bool(open_)
    return "; ".join(parts) if nearer else f"undecided, {parts[0]}"


def as_text(rows: Sequence[Mapping[str, str]], measure: str) -> list[str]:
    """What a plan prints. rows: answers as plain data; measure: as of `by_measurement`."""
    if not rows:
        return []
    head = "mid-training's own settings, as measured by `python -m bench grid`; nothing of it is in this plan"
    about = (
        "distances over one and two steps and two feature spaces, 95 % intervals over seeds; beyond its data a guess"
    )
    out = ["", head, *[f"  ({about})"] * any(r["state"] in ("advised", "cheaper", "kept") for r in rows)]
    alike: dict[str, list[str]] = {}
    for r in sorted(rows, key=lambda r: r["state"] == "unmeasured"):
        alike.setdefault(r["text"], []).append(ASKED.get(r["question"], r["question"]))
    out += [f"  {'; '.join(names)}: {text}" for text, names in alike.items()]
    if measure:
        out.append(f"  on the run itself, at this plan's forwards: {measure} chooses solver, calls and images")
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
                ends = [
                    1 / ends[0],
                    1 / ends[2] if math.isfinite(ends[2]) else 0.0,
                    1 / ends[1] if ends[1] else math.inf,
                ]
            elif (row["advised"], arm["value"]) != (value, was):
                continue
            ratio, low, high = ends
            where = f"{row['objective']} on {row['suite']}, {row['seeds']} seeds of a small network"
            return f"{ratio:.2g} times the distance [{low:.2g}, {high:.2g}] in {where}"
    return ""


def own(run: Run, key: str) -> Any:
    """The recipe's value of a key of its mid-training, of several after commas their values."""
    if "," in key:
        return [own(run, part) for part in key.split(",")]
    if key == SHARE:
        return run.mid.images_nimg / (run.mid.images_nimg + run.post.images_nimg)
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def overrides(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Key by key."""
    return zip(key.split(","), value, strict=True) if "," in key else [(key, value)]


def shown(key: str, value: Any) -> str:
    """As the command line takes it; without a key the value alone."""
    if key == SHARE:
        return f"a share of {value:.3g}"
    if not key:
        return (
            " and ".join(map(str, value))
            if isinstance(value, list)
            else f"{value:.3g}"
            if isinstance(value, float)
            else str(value)
        )
    return " ".join(
        f"{one}={text if isinstance(text, str) else json.dumps(text)}" for one, text in overrides(key, value)
    )


def _order(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, int | float) else (str(value), 0)


def _same(value: Any, was: Any) -> bool:
    if isinstance(value, list) and isinstance(was, list):
        return len(value) == len(was) and all(map(_same, value, was))
    if isinstance(value, float) and isinstance(was, float) and value > 0 and was > 0:
        return abs(math.log(value / was)) < ROUGHLY
    return bool(value == was)
