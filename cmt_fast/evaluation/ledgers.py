"""Figures that are written down as each ends, so that whoever is stopped in the middle computes none of them twice."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import files, sound


class Ledger:
    """The figures of one set of samples, by name. file: where they are written, with those of other sets; None: nowhere.

    What is written is read by the first rank, for all, so all know the same. Numbers come back with every bit.
    """

    def __init__(self, file: Path | None = None, name: str = "", all_: dict[str, dict[str, Any]] | None = None) -> None:
        self.file, self.name = file, name
        self._all = {} if all_ is None else all_

    @classmethod
    def read(cls, file: Path) -> dict[str, dict[str, Any]]:
        """All that a file says, the same on every rank; nothing of one that is not there or damaged. Every rank must call it."""
        text = ""
        if distributed.rank() == 0:
            with contextlib.suppress(OSError, ValueError):
                text = json.dumps(sound.read(file))
        try:
            found = json.loads(distributed.text_of_first(text) or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()) else {}

    @property
    def own(self) -> dict[str, Any]:
        """What is known of this set."""
        return self._all.setdefault(self.name, {})

    def once(self, figure: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, or did when it was asked before; every rank must call it. A terminal shows which it is."""
        if figure in self.own:
            return self.known(figure)
        with progress.phase(figure, quiet=True):
            value = compute()
        return self.put(figure, value)

    def known(self, figure: str) -> Any:
        """What was written down, to do with as one likes. Raises KeyError where nothing was."""
        return copy.deepcopy(self.own[figure])

    def put(self, figure: str, value: Any) -> Any:
        """Write it down, whole or not at all. A disk that takes nothing loses what was to be resumed, not the figure."""
        self.own[figure] = copy.deepcopy(value)
        if self.file is not None and distributed.rank() == 0:
            try:
                files.write_bytes(self.file, sound.signed(self._all).encode())
            except OSError:
                self.file = None
        return value
