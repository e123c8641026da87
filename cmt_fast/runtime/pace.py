"""How fast a stage goes, and what is left of it.

An estimate is of this process alone: steps of its last minutes, and pauses (evaluations) by the mean of those that it has
seen. What it has not seen it does not count, so an estimate bears a "~" wherever it is shown.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

# of steps: as long as several rounds of a teacher's rollouts, short enough to follow a machine that slows
WINDOW_S = 300.0


class Pace:
    """Steps by the clock. The first step is never counted: it compiles, proves and fills what later ones find."""

    def __init__(
        self,
        step: int,
        total: int,
        pauses: Callable[[int], int] = lambda n: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """step: done before this process; pauses: steps done -> how many pauses are still to come; clock: seconds."""
        self.step, self.total, self.pauses, self.clock = step, total, pauses, clock
        self.paused, self.seen = 0.0, 0  # seconds in pauses, and how many
        self._marks: collections.deque[tuple[float, int]] = collections.deque()

    def at(self, step: int) -> None:
        """`step` steps are done now."""
        self.step, now = step, self.clock() - self.paused
        marks = self._marks
        if len(marks) > 1 and now - marks[-2][0] < WINDOW_S / 300:  # the newest moves on until a second has gone by
            marks[-1] = (now, step)
        else:
            marks.append((now, step))
        while len(marks) > 2 and now - marks[1][0] > WINDOW_S:
            marks.popleft()

    def pause(self, seconds: float) -> None:
        """A pause has taken that long: it is in no step."""
        self.paused, self.seen = self.paused + seconds, self.seen + 1

    @property
    def per_s(self) -> float | None:
        """Steps a second; None before two steps are done."""
        if not self._marks:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / max(end - start, 1e-9) if last > first else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step and the last pause are done; None before two steps are."""
        per_s = self.per_s
        if per_s is None:
            return None
        pause_s = self.paused / self.seen if self.seen else 0.0
        return (self.total - self.step) / per_s + self.pauses(self.step) * pause_s
