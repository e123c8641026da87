"""What was used, as it is kept: amounts by phase, the bill of a stage, and reading it. Counting is of meters.py and ledger.py.

Files alone are read here, and no torch is needed: lists of runs, and who watches one, ask for bills too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from cmt_fast.storage import sound

FILE, ALIVE = "bill.json", "bill.alive"
PHASES = ("startup", "train", "teacher", "evaluation", "checkpoint", "stalled")


class Amount(NamedTuple):
    """Device-seconds; joules of those whose energy is known, None where none is; and the seconds of the others."""

    seconds: float = 0.0
    joules: float | None = None
    unmeasured_s: float = 0.0

    def plus(self, other: Amount) -> Amount:
        """Both together."""
        known = [j for j in (self.joules, other.joules) if j is not None]
        joules = sum(known) if known else None
        return Amount(self.seconds + other.seconds, joules, self.unmeasured_s + other.unmeasured_s)

    def beyond(self, other: Amount) -> Amount:
        """What this has more than another."""
        joules = None if self.joules is None else max(0.0, self.joules - (other.joules or 0.0))
        unmeasured = max(0.0, self.unmeasured_s - other.unmeasured_s)
        if unmeasured and not joules:
            joules = None
        return Amount(max(0.0, self.seconds - other.seconds), joules, unmeasured)

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def kwh(self) -> float | None:
        """None unless the energy of every second is known."""
        return None if self.unmeasured_s or self.joules is None else self.joules / 3.6e6


class Usage(NamedTuple):
    """A stage's bill: unit ("gpu", "core") -> phase -> amount.

    until: the time (Unix) up to which it counts; from_nimg: images of the stage that were trained before anyone counted;
    reason: why energy is unknown, where it is.
    """

    amounts: dict[str, dict[str, Amount]]
    until: float = 0.0
    from_nimg: int = 0
    reason: str = ""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Usage:
        """From what `stored` gave. Raises ValueError for something else."""
        try:
            amounts = {u: {p: Amount(**a) for p, a in phases.items()} for u, phases in stored["amounts"].items()}
            found = cls(amounts, float(stored["until"]), int(stored["from_nimg"]), str(stored["reason"]))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"no bill ({error})") from None
        numbers = [
            n
            for phases in amounts.values()
            for a in phases.values()
            for n in (a.seconds, a.joules or 0.0, a.unmeasured_s)
        ]
        if not all(isinstance(n, int | float) and abs(n) < float("inf") for n in (found.until, *numbers)):
            raise ValueError("no bill (what is no number stands for one)")
        return found

    def stored(self) -> dict[str, Any]:
        """As JSON types."""
        amounts = {u: {p: a._asdict() for p, a in phases.items()} for u, phases in self.amounts.items()}
        return self._asdict() | {"amounts": amounts}

    def plus(self, unit: str, spent: Mapping[str, Amount], until: float) -> Usage:
        """With more on it."""
        phases = dict(self.amounts.get(unit, {}))
        for phase, amount in spent.items():
            phases[phase] = phases.get(phase, Amount()).plus(amount)
        return self._replace(amounts={**self.amounts, unit: phases}, until=max(until, self.until))

    def total(self, unit: str) -> Amount:
        """All phases together; of a unit that was never held nothing."""
        total = Amount()
        for amount in self.amounts.get(unit, {}).values():
            total = total.plus(amount)
        return total

    def lost(self, kept: Usage) -> dict[str, Amount]:
        """unit -> what is on this bill and not on the one that is gone on from."""
        out: dict[str, Amount] = {}
        for unit, phases in self.amounts.items():
            for phase, amount in phases.items():
                more = amount.beyond(kept.amounts.get(unit, {}).get(phase, Amount()))
                if more.seconds:
                    out[unit] = out.get(unit, Amount()).plus(more)
        return out


def total(bills: Iterable[Usage], unit: str) -> Amount:
    """Several bills as one amount."""
    out = Amount()
    for bill in bills:
        out = out.plus(bill.total(unit))
    return out


def of_stage(folder: Path, manifest: Mapping[str, Any] | None) -> Usage | None:
    """The bill of a stage as far as it is known: its newest, of a checkpoint's manifest or of bill.json; None for none."""
    kept, found = journal(folder), []
    if of_manifest := billed(manifest):
        found.append(of_manifest)
    if kept:
        found.append(kept[0])
    return max(found, key=lambda bill: bill.until, default=None)


def billed(manifest: Mapping[str, Any] | None) -> Usage | None:
    """The bill of a checkpoint's manifest, None for none."""
    try:
        return Usage.of(manifest["bill"]) if manifest and manifest.get("bill") else None
    except ValueError:
        return None


def journal(folder: Path) -> tuple[Usage, int, Usage, dict[str, int]] | None:
    """bill.json: the newest bill, the step of its last checkpoint, the bill then, unit -> devices held. None where it is not
    there, or is not what was written."""
    try:
        return checked(folder)
    except (OSError, sound.Unsound):
        return None


def checked(folder: Path) -> tuple[Usage, int, Usage, dict[str, int]]:
    """The same. Raises FileNotFoundError, Unsound."""
    body = sound.read(folder / FILE)
    try:
        settled, held = body["settled"], {str(unit): int(n) for unit, n in body["held"].items()}
        return Usage.of(body["bill"]), int(settled["step"]), Usage.of(settled["bill"]), held
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise sound.Unsound(folder / FILE, f"holds no bill ({error})") from None


def pulse(now: float) -> bytes:
    """What bill.alive holds: a time of fixed width and its checksum, so that it can be written over the one before."""
    text = f"{now:017.6f}"
    return f"{text} {xxhash.xxh32_hexdigest(text.encode())}".encode()


def alive(folder: Path) -> float | None:
    """When a process that did not end its account is last known to have lived; None where that is not said, or damaged."""
    try:
        text = sound.data(folder / ALIVE, 100).decode("ascii")
    except (OSError, ValueError):
        return None
    found = re.fullmatch(r"(\d{10}\.\d{6})(?: ([0-9a-f]{8}))?", text)
    sums = found and found[2] in (None, xxhash.xxh32_hexdigest(found[1].encode()))
    return float(found[1]) if found and sums else None
