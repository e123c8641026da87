"""A run's state on a terminal: a page that is drawn again and again, or one line a change where there is no terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cmt_fast.runtime import pace, words
from cmt_fast.watch.state import RunState, StageState

MOODS = {"good": "green", "waiting": "yellow", "bad": "bold red"}
HEIGHTS = "▁▂▃▄▅▆▇█"
POINTS = 20  # of a curve of losses
WIDE = 100  # characters of a terminal on which everything has a place
NARROW = 80  # below which bars, speeds and what is best so far are left out
DASH = "–"


def page(state: RunState, width: int = WIDE) -> RenderableType:
    """One run, all of it. width: of the terminal, in characters."""
    title = Text.assemble((state.name, "bold"), ("  " + str(state.folder), "dim"))
    parts: list[RenderableType] = [title, Text(state.life, MOODS[state.mood]), Text(), _stages(state, width)]
    if state.teacher or any(s.evaluations for s in state.stages):
        parts += [
            Text(),
            Text(_distance(state), "dim"),
            *[_evaluations(state, width >= NARROW)] * any(s.evaluations for s in state.stages),
        ]
    parts += [Text(), Text(_spent(state), "dim")]
    return Padding(Group(*parts), (1, 1))


def overview(states: Sequence[RunState], width: int = WIDE) -> RenderableType:
    """Several runs, a row each. width: of the terminal, in characters."""
    steps, roomy = sorted({k for s in states for k in s.steps}), width >= NARROW
    more = [*["images/s", "left"] * roomy, *(f"@{k}" for k in steps), *["sign of life"] * roomy]
    table = _table(["run", "stage", "trained", *more], 2)
    table.columns[0].no_wrap = False
    if roomy:  # it gives way before numbers do
        table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for state in states:
        stage = state.now or _last(state)
        running = state.now is not None
        newest = [_newest(state, str(k)) for k in steps]
        speed = Text(f"{stage.speed:,.0f}" if running and stage.speed else DASH)
        left = Text(pace.duration(stage.left_s) if running and stage.left_s is not None else DASH)
        table.add_row(
            Text(
                state.folder.name or state.name, "bold" if roomy else f"bold {MOODS[state.mood].removeprefix('bold ')}"
            ),
            Text("done" if state.finished else stage.name),
            Text(f"{100 * _share(state):.0f} %"),
            *[speed, left] * roomy,
            *(Text(number(found[1]) if found else DASH) for found in newest),
            *[Text(re.split("[;:]", state.life)[0], MOODS[state.mood])] * roomy,
        )
    return Padding(Group(Text("@k: Fréchet distance in k steps", "dim"), table), (1, 1))


def line(state: RunState) -> str:
    """One run in one line."""
    stage = state.now or _last(state)
    parts = [f"{state.name}: {stage.name} {100 * stage.share:.0f} %", f"{stage.nimg:,}/{stage.total_nimg:,} images"]
    if state.now and stage.speed:
        parts.append(f"{stage.speed:,.0f} images/s")
    if state.now and stage.left_s is not None:
        parts.append(f"{pace.duration(stage.left_s)} left")
    if stage.losses:
        parts.append(f"loss {number(stage.losses[-1])}")
    parts += [f"Fréchet {number(f[1])} in {words.steps(k)}" for k in state.steps if (f := _newest(state, str(k)))]
    return "  ".join([*parts, state.life])


def sparkline(values: Sequence[float], points: int = POINTS) -> str:
    """A curve in one line, on a log scale where all values allow it; values that are not finite are left out."""
    sound = [v for v in values if math.isfinite(v)]
    if len(sound) < 2:
        return ""
    n = min(points, len(sound))
    means = [
        sum(part) / len(part) for i in range(n) if (part := sound[i * len(sound) // n : (i + 1) * len(sound) // n])
    ]
    if min(means) > 0:
        means = [math.log(v) for v in means]
    low, high = min(means), max(means)
    top = len(HEIGHTS) - 1
    return "".join(HEIGHTS[round(top * (v - low) / (high - low))] if high > low else HEIGHTS[0] for v in means)


def number(x: float) -> str:
    """Four digits."""
    return f"{x:.4g}"


def short(n: int) -> str:
    """A count of images: all digits below 100,000, else `128k`, `1.28M`."""
    if n < 100_000:
        return f"{n:,}"
    return f"{n / 1000:.4g}k" if n < 1_000_000 else f"{n / 1e6:.4g}M"


def _stages(state: RunState, width: int) -> Table:
    wide, roomy = width >= WIDE, width >= NARROW
    table = _table(
        ["stage", *[""] * roomy, "", *["images", "images/s"] * roomy, "left", "loss", *[""] * wide], 1 + roomy
    )
    if wide:
        table.columns[-1].justify = "left"
    for s in state.stages:
        waiting, now = s.state == "waiting", s == state.now
        bar = ProgressBar(
            100,
            100 * s.share,
            width=20 if wide else 10,
            complete_style="cyan" if now else "green",
            finished_style="green",
        )
        images = f"{short(s.nimg)} of {short(s.total_nimg)}" if s.state == "begun" else short(s.nimg or s.total_nimg)
        left = pace.duration(s.left_s) if now and s.left_s is not None else ("done" if s.state == "done" else DASH)
        table.add_row(
            Text(s.name, "dim" if waiting else ("bold" if now else "")),
            *[bar] * roomy,
            Text(f"{100 * s.share:.0f} %"),
            *[Text(images), Text(f"{s.speed:,.0f}" if s.speed else DASH)] * roomy,
            Text(left),
            Text(number(s.losses[-1]) if s.losses else DASH),
            *[Text(sparkline(s.losses) or (f"from {s.elsewhere}" if s.elsewhere else ""), "cyan")] * wide,
            style="dim" if waiting else "",
        )
    return table


def _evaluations(state: RunState, roomy: bool) -> Table:
    """The newest evaluation of every stage and, where there is room, its best so far where that is another one."""
    table = _table(
        [
            "",
            *(h for k in state.steps for h in (f"in {words.steps(k)}" if roomy else f"@{k}", *["best so far"] * roomy)),
        ],
        1,
    )
    for s in (s for s in state.stages if s.evaluations):
        cells = []
        for k in map(str, state.steps):
            found = s.evaluations.get(k)
            if not found:
                cells += [Text(DASH)] * (1 + roomy)
                continue
            nimg, best = min(found, key=lambda e: e[1])
            is_best = best == found[-1][1]
            at = "this one" if is_best else f"{number(best)} at {short(nimg)}"
            cells += [Text(number(found[-1][1]), "bold green" if is_best else ""), *[Text(at, "dim")] * roomy]
        last = max(found[-1][0] for found in s.evaluations.values())
        title = f"{s.name} at {short(last)}" if roomy else s.name
        table.add_row(Text(title, "bold" if s == state.now else ""), *cells)
    return table


def _distance(state: RunState) -> str:
    """What the figures are, and that of the teacher in its many steps."""
    teacher = f"; teacher, {words.steps(state.teacher[0])}: {number(state.teacher[1])}" if state.teacher else ""
    return state.distance + teacher


def _spent(state: RunState) -> str:
    """Time and place taken."""
    spent = sum(s.spent_s for s in state.stages if not s.elsewhere)
    units: dict[str, float] = {}
    for s in state.stages:
        for unit, seconds in s.devices.items() if not s.elsewhere else ():
            units[unit] = units.get(unit, 0.0) + seconds
    parts = [f"{pace.duration(spent)} of training and evaluation"]
    parts += [f"{s / 3600:,.1f} {'GPU' if unit == 'gpu' else unit}-hours" for unit, s in units.items() if s >= 360]
    now = state.now
    if now and now.left_s is not None:
        after = [s.name for s in state.stages if s.state == "waiting"]
        parts.append(f"{pace.duration(now.left_s)} left of {now.name}" + f", then {', '.join(after)}" * bool(after))
    return "; ".join([*parts, f"{words.size(state.bytes)} on disk"])


def _table(head: list[str], left: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for i, title in enumerate(head):
        table.add_column(Text(title), justify="left" if i < left else "right", no_wrap=True)
    return table


def _newest(state: RunState, k: str) -> tuple[int, float] | None:
    """The newest evaluation in k steps: of the stage that is trained, or of the last before it."""
    own = [s for s in state.stages if s.evaluations.get(k)]
    mine = [s for s in own if s == state.now] or [s for s in own if s.name != "control"] or own
    return mine[-1].evaluations[k][-1] if mine else None


def _last(state: RunState) -> StageState:
    """The last stage that has begun, else the first."""
    return next((s for s in reversed(state.stages) if s.state != "waiting"), state.stages[0])


def _share(state: RunState) -> float:
    whole = sum(s.total_nimg for s in state.stages)
    return sum(s.share * s.total_nimg for s in state.stages) / max(1, whole)
