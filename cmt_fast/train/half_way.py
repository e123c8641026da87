"""What people look at while a run trains, beside its own record: the page of the run, and the loggers' packages.

Drawing a page is the work of another room, which reads what runs left; it is handed in as a callable.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.storage import loggers

SHARE = 0.02  # of the time between two pages that drawing one may take
GUESS_S = 0.4  # what the first is taken to cost: a run of seconds is drawn at its end only


class HalfWay:
    """Draws the page of a run after evaluations, as often as it is cheap. page: None where nobody draws, as on other ranks."""

    def __init__(self, page: Callable[[], object] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.page, self.clock = page, clock
        self.ended, self.took = clock(), GUESS_S

    def draw(self) -> bool:
        """Whether it was drawn. It is left out while the last one took more than SHARE of the time since.

        A page that cannot be drawn is raised, once: it is not tried again while the run trains.
        """
        begun, page = self.clock(), self.page
        if page is None or self.took > SHARE * (begun - self.ended):
            return False
        self.page = None
        page()
        self.page, self.ended = page, self.clock()
        self.took = self.ended - begun
        return True


def check_loggers(run: Run) -> None:
    """Raises ConfigError for a logger whose package is not installed."""
    for name, extra in loggers.missing(run.logging):
        raise ConfigError(f"loggers: {name!r} is not installed; pip install 'cmt-fast[{extra}]'")
