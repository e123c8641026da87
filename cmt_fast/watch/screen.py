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

from cmt_fast.runtime import words
from cmt_fast.runtime.words import DASH, number, printable
from cmt_fast.watch.state import RunState, StageState

MOODS = {
    "finished": "green", "alive": "green", "new": "yellow", "stopped": "yellow", "quiet": "yellow",
    "ahead": "yellow", "lost": "bold red", "hangs": "bold red",
}  # of a life  # fmt: skip
HEIGHTS = "▁▂▃▄▅▆▇█"
POINTS = 20  # of a curve of losses
WIDE = 100  # characters of a terminal on which everything has a place
NARROW = 80  # below which bars, speeds and what is best so far are left out


def page(state: RunState, width: int = WIDE) -> RenderableType:
    """One run, all of it. width: of the terminal, in characters."""
    title = Text.assemble((printable(state.name), "bold"), ("  " + printable(str(state.folder)), "dim"))
    parts: list[RenderableType] = [
        title,
        Text(state.life.text, MOODS[state.life.word]),
        Text(),
        _stages(state, width),
    ]
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
        life = state.life
        speed = Text(words.speed(stage.speed) if running and stage.speed else DASH)
        left = Text(words.duration(stage.left_s) if running and stage.left_s is not None else DASH)
        table.add_row(
            Text(
                printable(state.folder.name or state.name),
                "bold" if roomy else f"bold {MOODS[life.word].removeprefix('bold ')}",
            ),
            Text("done" if state.finished else stage.name),
            Text(f"{100 * _share(state):.0f} %"),
            *[speed, left] * roomy,
            *(Text(number(found[1]) if found else DASH) for found in newest),
            *[Text(re.split("[;:]", life.text)[0], MOODS[life.word])] * roomy,
        )
    return Padding(Group(Text("@k: Fréchet distance in k steps", "dim"), table), (1, 1))


def line(state: RunState) -> str:
    """One run in one line."""
    stage = state.now or _last(state)
    parts = [
        f"{printable(state.name)}: {stage.name} {100 * stage.at.share:.0f} %",
        f"{stage.at.nimg:,}/{stage.at.stage.images_nimg:,} images",
    ]
    if state.now and stage.speed:
        parts.append(f"{words.speed(stage.speed)} images/s")
    if state.now and stage.left_s is not None:
        parts.append(f"{words.duration(stage.left_s)} left")
    if stage.losses:
        parts.append(f"loss {number(stage.losses[-1])}")
    parts += [f"Fréchet {number(f[1])} in {words.steps(k)}" for k in state.steps if (f := _newest(state, str(k)))]
    return "  ".join([*parts, state.life.text])


def sparkline(values: Sequence[float], points: int = POINTS) -> str:
    """A curve in one line, on a log scale where all values allow it; values that are not finite are left out."""
    sound = values if all(map(math.isfinite, values)) else [v for v in values if math.isfinite(v)]
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
        at, waiting, now, whole = s.at, s.waiting, s == state.now, s.at.stage.images_nimg
        bar = ProgressBar(
            100,
            100 * at.share,
            width=20 if wide else 10,
            complete_style="cyan" if now else "green",
            finished_style="green",
        )
        images = f"{short(at.nimg)} of {short(whole)}" if s.begun else short(at.nimg or whole)
        left = words.duration(s.left_s) if now and s.left_s is not None else ("done" if at.done else DASH)
        table.add_row(
            Text(s.name, "dim" if waiting else ("bold" if now else "")),
            *[bar] * roomy,
            Text(f"{100 * at.share:.0f} %"),
            *[Text(images), Text(words.speed(s.speed) if s.speed else DASH)] * roomy,
            Text(left),
            Text(number(s.losses[-1]) if s.losses else DASH),
            *[Text(sparkline(s.losses) or (f"from {at.folder.parent}" if not at.own else ""), "cyan")] * wide,
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
    spent = sum(s.spent_s for s in state.stages if s.at.own)
    units: dict[str, float] = {}
    for s in state.stages:
        for unit, hours in s.at.hours.items() if s.at.own else ():
            units[unit] = units.get(unit, 0.0) + hours
    parts = [f"{words.duration(spent)} of training and evaluation"]
    parts += [words.device_hours(units)] * bool(units)
    now = state.now
    if now and now.left_s is not None:
        after = [s.name for s in state.stages if s.waiting]
        parts.append(f"{words.duration(now.left_s)} left of {now.name}" + f", then {', '.join(after)}" * bool(after))
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
    return next((s for s in reversed(state.stages) if not s.waiting), state.stages[0])


def _share(state: RunState) -> float:
    whole = sum(s.at.stage.images_nimg for s in state.stages)
    return sum(s.at.share * s.at.stage.images_nimg for s in state.stages) / max(1, whole)
