"""What a person sees while it runs: a display that is drawn over on a terminal, and lines with the time elsewhere.

    counting   a part whose length is known: a bar, or a line now and then
    phase      a part that would be silent (an evaluation, a compilation): says what it is where it lasts
    Stage      the steps of a stage: how far, how fast, what is left, what it costs

Lines come by the clock and not by the step: one after the first steps, then one every `every_s()` seconds, whatever a step
takes. Parts within parts share one display, the innermost is named. Ranks after the first are silent.

One thread draws, tells of phases that last, and beats the run's heart through them. It asks nothing of the device; a loss is
read, which waits for the device, when a line is due and not otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import once, pace, streams, words
from cmt_fast.runtime.words import printable
from cmt_fast.storage.heartbeat import beat

EVERY_S, VARIABLE = 60.0, "CMT_LOG_SECONDS"
LASTS_S = 5.0  # a phase is worth a line of its own from here on
ALIVE_S = 1800.0  # a phase that counts nothing for longer no longer beats the heart: it may hang
LOOK_S = 5.0  # on a terminal a loss is read this often
STEADY_S = 1.0  # the first line of a stage waits for so long a stretch of steps

_every_s: float | None = None
_open: list[Part] = []  # outermost first
_shown: Display | None = None


def every_s() -> float:
    """Seconds between lines in a log: `--log-every-s`, else CMT_LOG_SECONDS, else 60. Raises ConfigError."""
    if _every_s is not None:
        return _every_s
    text = os.environ.get(VARIABLE, "")
    return _seconds(VARIABLE, text) if text else EVERY_S


def set_every_s(given: str | None) -> None:
    """Of this process from now on; None leaves it. Raises ConfigError for what is no positive number, as of CMT_LOG_SECONDS."""
    global _every_s
    if given is not None:
        _every_s = _seconds("--log-every-s", given)
    every_s()


def _seconds(name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ConfigError(f"{name}: {text!r} is not a number of seconds above 0")


def first() -> bool:
    """Whether this process is the one that speaks."""
    return once.rank() == 0


def say(text: str) -> None:
    """A line for the person at the terminal, above what is drawn there."""
    streams.put(printable(text), sys.stdout)


def told(title: str, *parts: str) -> None:
    """A line of a stage, with the time where lines have it; nothing on ranks after the first."""
    if first():
        (_shown or Display(sys.stdout)).line(title, *parts)


@dataclasses.dataclass(eq=False)
class Part:
    """Something that takes time: what it is, how much of it is done, and when it last said so."""

    title: str
    total: int | None = None
    run: Path | None = None
    lasts_s: float = LASTS_S
    done: int = 0
    start: float = dataclasses.field(default_factory=time.monotonic)
    said: float | None = None
    moved: float = dataclasses.field(default_factory=time.monotonic)

    def count(self) -> str:
        return f"{self.done:,}/{self.total:,}" if self.total else ""


@contextlib.contextmanager
def phase(
    title: str, total: int | None = None, run: Path | None = None, quiet: bool = False, again: bool = False
) -> Iterator[Callable[..., None]]:
    """Inside: a part of the work that would be silent. Yields the function to call with how many more of `total` are done.

    That function takes a total too, of what does not know it before.

    On a terminal it is drawn at once. Elsewhere it says what it is when it has lasted for LASTS_S seconds, how far it is
    every `every_s()`, and at its end how long it took. quiet: not by itself, only within what is already shown.
    again: it comes every few steps, and is worth a line only where it is as long as the time between lines.
    run: the folder whose heart beats meanwhile; by default that of the part around it.
    """
    lasts_s = max(LASTS_S, every_s()) if again else LASTS_S
    part = Part(title, total, run or (_open[-1].run if _open else None), lasts_s)
    if not first() or (quiet and _shown is None):
        yield functools.partial(_advance, part)
        return
    with _within(part, sys.stderr) as display:
        yield functools.partial(_advance, part)
    took = time.monotonic() - part.start
    # a part of a part was not told of; what stood alone on a terminal goes as it came
    if _phase() is None and took >= part.lasts_s and (_shown if display.live else part.said is not None):
        display.line(_name(), f"{title}: took {words.duration(took)}")


def counting(title: str, total: int, run: Path | None, quiet: bool = False) -> contextlib.AbstractContextManager:
    """A phase of known length: what it yields is to be called with how many more are done."""
    return phase(title, total, run, quiet)


def _advance(part: Part, more: int, total: int | None = None) -> None:
    part.done, part.total, part.moved = part.done + more, total or part.total, time.monotonic()
    if part.run and first():
        beat(part.run)


def _phase() -> Part | None:
    """The outermost that is open and no stage: what is told of."""
    return next((part for part in list(_open) if not isinstance(part, Stage)), None)


def _count() -> str:
    """How far the innermost is that counts: 1,200/2,000."""
    return next(
        (count for part in reversed(list(_open)) if not isinstance(part, Stage) and (count := part.count())), ""
    )


def _name() -> str:
    """Of the stage that is open, for the head of a line."""
    return next((part.title for part in _open if isinstance(part, Stage)), "")


@contextlib.contextmanager
def _within(part: Part, stream: TextIO) -> Iterator[Display]:
    """The part is open: on the display that is there, or on one of its own."""
    global _shown
    mine = None
    if _shown is None:
        mine = _shown = Display(stream)
    _open.append(part)
    display = _shown
    try:
        if mine:
            mine.begin()
            if part.run:
                beat(part.run)
        yield display
    finally:
        _open.remove(part)
        if mine:
            _shown = None
            mine.end()


class Stage(Part):
    """The steps of a stage, told by the clock. Used as `with Stage(...) as shown`, on every rank."""

    def __init__(
        self, title: str, step: int, total: int, batch: int, run: Path, *, pauses: Callable[[int], int] = lambda n: 0,
        unit: str = "core", quiet: bool = False, clock: Callable[[], float] = time.monotonic,
        nimg: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        """step: done before; batch: images a step; pauses: as of `Pace`; unit: of the bill, "gpu" or "core"; nimg: images after n
        steps, where earlier ones had another batch.

        Many parameters: what a line is made of.
        """
        super().__init__(title, total, run, done=step)
        self.batch, self.unit, self.quiet, self.clock = batch, unit, quiet or not first(), clock
        self.nimg = nimg or (lambda n: n * batch)
        self.pace = pace.Pace(step, total, pauses, clock)
        self.loss: float | None = None
        self.begun = clock()
        self.steps, self.last_loss = total, -float("inf")
        self.last_line: float | None = None
        self.first_at: float | None = None
        self.bill: tuple[float, int, float] | None = None
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        if not self.quiet:
            self.display = self._ending.enter_context(_within(self, sys.stdout))
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.quiet and not any(error) and self.done == self.total and self.first_at is not None:
            self.display.line(self.title, *self.parts(end=True))
        self._ending.close()

    def step(self, n: int, loss: Callable[[], float | None]) -> None:
        """n steps are done. Costs nothing but a look at the clock, except when something is due.

        loss: that of the steps since the last row of metrics, None where there were none; asked when it is due.
        """
        if self.quiet:
            return
        self.done, now = n, self.clock()
        self.pace.at(n)
        self.first_at = now if self.first_at is None else self.first_at
        live = self.display.live
        steady = now - self.first_at >= STEADY_S
        due = steady if self.last_line is None else now - self.last_line >= every_s()
        soon = n == self.steps or (self.last_line is not None and (self.pace.left_s or 0.0) < every_s() / 4)
        due = due and not live and not soon  # the last line comes at the end, when the stage is whole
        if now - self.last_loss >= LOOK_S if live else due:
            self.saw(loss())
            self.last_loss = now
        if due:
            self.last_line = now
            self.display.line(self.title, *self.parts())

    def saw(self, loss: float | None) -> None:
        """The newest loss."""
        self.loss = self.loss if loss is None else loss

    def spent(self, hours: float, held: int) -> None:
        """The stage's bill at this moment: device-hours of all ranks and restarts, and how many devices it holds."""
        self.bill = hours, held, self.clock()

    @contextlib.contextmanager
    def pause(self, title: str) -> Iterator[Callable[[int], None]]:
        """Inside: no steps, but a phase that comes again."""
        start = self.clock()
        with phase(title, quiet=True) as advance:
            yield advance
        self.pace.pause(self.clock() - start)

    def parts(self, end: bool = False) -> list[str]:
        """What a line says. Its end is left out where there is no room."""
        n, per_s, left = self.done, self.pace.per_s, self.pace.left_s
        width = len(f"{self.steps:,}")
        out = [f"step {n:>{width},}/{self.steps:,}", f"{100 * n // self.steps:>3} %"]
        out.append(f"{self.nimg(n):>{len(f'{self.nimg(self.steps):,}')},} images")
        if self.loss is not None:
            out.append(f"loss {self.loss:<7.4g}")
        if per_s:
            out.append(f"{words.speed(per_s * self.batch):>6} img/s")
        if end:  # of all things this is not left out
            out.insert(2, f"took {words.duration(self.clock() - self.begun)}")
        elif left is not None:
            out.append(f"ETA ~{words.duration(left)}")
        if self.bill:
            hours, held, at = self.bill
            now = hours + (0.0 if end else (self.clock() - at) * held / 3600)
            rest = "" if end or left is None else f", ~{words.hours(left * held / 3600)} left"
            out.append(f"{words.device_hours({self.unit: now})} spent{rest}")
        return out


class Display:
    """Where all of it is shown: drawn over where `stream` is a terminal that can be drawn on, else lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.live = stream, _can_draw(stream)
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._ended, self._lock = threading.Event(), threading.Lock()

    def begin(self) -> None:
        """Draw from now on."""
        if self.live:
            self._live = Live(
                self, console=Console(file=self.stream), transient=True, refresh_per_second=4,
                redirect_stdout=_can_draw(sys.stdout), redirect_stderr=_can_draw(sys.stderr),
            )  # fmt: skip
            self._live.start()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Leave the terminal as it was."""
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self._live:
            self._live.stop()

    def line(self, title: str, *parts: str) -> None:
        """A line that stays."""
        text = f"{title:>8} {'  '.join(part for part in parts if part)}".rstrip()
        stream = (
            sys.stderr if self.stream is sys.stderr else sys.stdout
        )  # which a Live may have put its own in place of
        if self.live:
            width = (self._live.console if self._live else Console(file=self.stream)).width
            text = fitted([f"{title:>8} {parts[0]}", *parts[1:]], width) if len(parts) > 1 else text
        else:
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        with self._lock:
            streams.put(printable(text), stream)

    def _watch(self) -> None:
        """Tell of phases that last, and beat the heart of a run whose phase is at work."""
        while not self._ended.wait(0.25 if every_s() < 10 else 1.0):
            now, part = time.monotonic(), _phase()
            if part is None:
                continue
            if part.run and now - max(p.moved for p in [part, *_open]) < ALIVE_S:
                beat(part.run)
            lasts = not self.live and now - part.start >= part.lasts_s
            if lasts and (part.said is None or now - part.said >= every_s()):
                self.line(
                    _name(),
                    part.title,
                    *([f"{words.duration(now - part.start)} so far"] if part.said else []),
                    _count(),
                )
                part.said = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """At most two lines: the bar, and beneath it what there is room for."""
        now, width = time.monotonic(), options.max_width
        parts = list(_open)
        if not parts:
            return
        stage = next((part for part in parts if isinstance(part, Stage)), None)
        inner = next((part for part in parts if part is not stage and now - part.start > 0.5), None)
        head = stage or parts[0]
        said = stage.parts() if stage else [head.count(), _left(head, now) or words.duration(now - head.start)]
        if stage:  # beside the bar the step and the time that is left; what is left out first is the number of images
            eta = next((p for p in said if p.startswith("ETA")), "")
            rest, said = [*(p for p in said[3:] if p != eta), said[2]], [*said[:2], eta]
        else:
            rest = []
        yield _bar(f"{head.title:>8} ", head, [p for p in said if p], width, options.ascii_only)
        notes = [inner.title, _count(), words.duration(now - inner.start)] if stage and inner else []
        notes = [note for note in notes if note]
        if rest or notes:
            yield _line(
                fitted([" " * 8 + " " + (notes + rest)[0].strip(), *(p.strip() for p in (notes + rest)[1:])], width)
            )


def _left(part: Part, now: float) -> str:
    """How long it will still take by what it took."""
    if not part.total or not part.done:
        return ""
    return f"ETA ~{words.duration((now - part.start) * (part.total - part.done) / part.done)}"


def _bar(title: str, part: Part, parts: list[str], width: int, ascii_only: bool) -> Text:
    """A bar with words behind it: as many as leave ten columns for the bar."""
    said = fitted(parts, max(width - len(title) - 12, 0))
    room = min(40, width - len(title) - len(said) - 2)
    text = Text(title, style="bold", no_wrap=True, overflow="ellipsis")
    if part.total and room >= 4:
        full = min(room, room * part.done // part.total)
        done, open_ = "#-" if ascii_only else "━─"  # told apart without colours too
        text.append(done * full, style="green")
        text.append(open_ * (room - full), style="bright_black")
        text.append("  ")
    return text.append(said, style="not bold")


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def fitted(parts: list[str], width: int) -> str:
    """Parts side by side, without the last ones that there is no room for; the first is always there."""
    text = parts[0] if parts else ""
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text


def _can_draw(stream: Any) -> bool:
    """Whether it is a terminal that moves its cursor: not a file, a pipe, a notebook or TERM=dumb."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")
