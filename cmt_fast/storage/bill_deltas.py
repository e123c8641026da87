"""A stage's bill in its rows of metrics: whole where a process begins to write, then what came onto it, in a few bytes.

A whole bill has every phase of every unit and was 60 % of a row's bytes; between two rows one or two phases grow. Such a row says

    "bill_more": {"until": 8.123, "gpu train": [8.123, 2400.5]}

seconds of time that went by, and by unit and phase device-seconds, joules and seconds of unknown energy: [s] where no energy is
known, [s, J] where all of it is, [s, J, s] else. All are thousandths counted as whole numbers, so that the sum over any number
of rows is within half a thousandth of what was counted.
"""

from __future__ import annotations

from typing import Any

Bill = dict[str, Any]  # as usage/bills.py stores it
SCALE = 1000
Parts = dict[tuple[str, str], tuple[int, int | None, int]]


def _parts(bill: Bill) -> Parts:
    """(unit, phase) -> seconds, joules and seconds of unknown energy, in thousandths."""
    out = {}
    for unit, phases in bill["amounts"].items():
        for phase, a in phases.items():
            joules = None if a.get("joules") is None else round(SCALE * a["joules"])
            out[unit, phase] = round(SCALE * a["seconds"]), joules, round(SCALE * a.get("unmeasured_s", 0.0))
    return out


def _rest(bill: Bill) -> Bill:
    """What does not grow."""
    return {key: value for key, value in bill.items() if key not in ("amounts", "until")}


class Writer:
    """Bills of one process in the order of its rows."""

    def __init__(self) -> None:
        self.last: Bill | None = None
        self.parts: Parts = {}

    def short(self, bill: Bill) -> dict[str, Any]:
        """What stands for it in a row: {"bill": ...} or {"bill_more": ...}."""
        last, self.last = self.last, bill
        before, now = self.parts, _parts(bill)
        self.parts = now
        if last is None or _rest(last) != _rest(bill):
            return {"bill": bill}
        more: dict[str, Any] = {
            "until": (round(SCALE * bill.get("until", 0.0)) - round(SCALE * last.get("until", 0.0))) / SCALE
        }
        for key, (seconds, joules, unknown) in now.items():
            s, j, u = before.get(key, (0, None, 0))
            if (seconds, joules, unknown) == (s, j, u):
                continue
            if " " in "".join(key) or (joules is None and j is not None):
                return {"bill": bill}
            grown = [
                (seconds - s) / SCALE,
                None if joules is None else (joules - (j or 0)) / SCALE,
                (unknown - u) / SCALE,
            ]
            if joules is None and grown[0] == grown[2]:
                grown = grown[:1]
            elif joules is not None and not grown[2]:
                grown = grown[:2]
            more[" ".join(key)] = grown
        return {"bill": bill} if before.keys() - now.keys() else {"bill_more": more}


class Reader:
    """Bills again from the rows of a file, in their order."""

    def __init__(self) -> None:
        self.until, self.rest = 0, dict[str, Any]()
        self.parts: Parts | None = None

    def lost(self) -> None:
        """A row could not be read: bills are unknown until a whole one comes."""
        self.parts = None

    def whole(self, wall: dict[str, Any]) -> dict[str, Any]:
        """A row's "wall" with its bill, whichever way it is written; one without has none."""
        if isinstance(wall.get("bill"), dict):
            self._start(wall["bill"])
            return wall
        if "bill_more" not in wall:
            return wall
        wall = dict(wall)
        more = wall.pop("bill_more")
        try:
            return wall if self.parts is None else {**wall, "bill": self._grown(more)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # no bill, whatever it is
            self.lost()
            return wall

    def _grown(self, more: dict[str, Any]) -> Bill:
        """The bill with what came onto it."""
        assert self.parts is not None
        self.until += round(SCALE * more["until"])
        for name, grown in more.items():
            if name == "until":
                continue
            unit, phase = name.split(" ")
            s, j, u = self.parts.get((unit, phase), (0, None, 0))
            seconds, joules, unknown = (grown[0], None, grown[0]) if len(grown) == 1 else (*grown, 0.0)[:3]
            energy = j if joules is None else (j or 0) + round(SCALE * joules)
            self.parts[unit, phase] = s + round(SCALE * seconds), energy, u + round(SCALE * unknown)
        return self._bill()

    def _start(self, bill: Bill) -> None:
        try:
            self.until, self.parts = round(SCALE * bill.get("until", 0.0)), _parts(bill)
            self.rest = _rest(bill)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):  # of another version, or none
            self.parts = None

    def _bill(self) -> Bill:
        amounts: dict[str, dict[str, Any]] = {}
        for (unit, phase), (s, j, u) in (self.parts or {}).items():
            joules = None if j is None else j / SCALE
            amounts.setdefault(unit, {})[phase] = {"seconds": s / SCALE, "joules": joules, "unmeasured_s": u / SCALE}
        return {"amounts": amounts, "until": self.until / SCALE, **self.rest}
