"""The bill of a stage: what meters counted, over all ranks and restarts, each second of each device once.

    STAGE/bill.json    the sum, written at every row, and what it was at the last checkpoint, with what writing that took
    STAGE/bill.alive   the last time at which a process is known to have lived, while it has an account here
    manifest["bill"]   the sum as the writing of that checkpoint began: kept with the weights wherever they go

A process that finds bill.alive knows of a kill: what was billed after the checkpoint that it goes on from, and the time
from there to the last sign of life, becomes `stalled`. A kill can hide PULSE_S seconds of each device at most, and before a
stage has opened its account what its process had done until then; of the energy it hides what came after the last row.
A process is billed from `loop.train` on, from stage to stage without a gap, to its last stage's last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.runtime import distributed
from cmt_fast.usage.meters import Amount, Meter

FILE, ALIVE = "bill.json", "bill.alive"
PULSE_S = 5.0


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
        """From what `stored` gave. Raises KeyError, TypeError or ValueError for something else."""
        amounts = {u: {p: Amount(**a) for p, a in phases.items()} for u, phases in stored["amounts"].items()}
        return cls(amounts, float(stored["until"]), int(stored["from_nimg"]), str(stored["reason"]))

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


class Account:
    """The bill of one stage while it trains. Every rank makes every call; `write`: one of them keeps the files."""

    def __init__(
        self, folder: Path, meter: Meter, manifest: Mapping[str, Any] | None, write: bool, pulse_s: float | None = None
    ) -> None:
        """manifest: of the checkpoint that is gone on from. pulse_s: 0 writes bill.alive only when the bill is."""
        self.folder, self.meter, self.write = folder, meter, write
        journal = _journal(folder)
        # from here on this process counts, and not the time in which there was none
        self.bill = _resumed(manifest, journal, _alive(folder))._replace(until=meter.until)
        self.held = meter.held * distributed.size()  # until all ranks have said what they hold
        self.settled = {"step": manifest["step"] if manifest else 0, "bill": self.bill.stored()}
        self._ended, self._pulse = threading.Event(), None
        self._save()
        pulse_s = PULSE_S if pulse_s is None else pulse_s
        if write and pulse_s:
            self._pulse = threading.Thread(target=self._beat, args=(pulse_s,), name="bill", daemon=True)
            self._pulse.start()

    def add(self) -> dict[str, Any]:
        """Put on the bill what all meters counted. Returns it as rows and manifests hold it; a collective call."""
        spent, self.held = self.meter.take()
        reason = self.meter.counter.reason or self.bill.reason
        self.bill = self.bill.plus(self.meter.unit, spent, self.meter.until)._replace(reason=reason)
        self._save()
        return self.bill.stored()

    def settle(self, step: int, end: bool) -> None:
        """A checkpoint of `step` is on disk: nothing of the bill so far can be lost. end: the stage ends or stops here."""
        self.add()
        self.settled = {"step": step, "bill": self.bill.stored()}
        self._save()
        if end:
            self._stop()
            if self.write:
                (self.folder / ALIVE).unlink(missing_ok=True)

    def close(self) -> None:
        """Write no more. Where the account was not ended, what was done since the checkpoint will be billed as lost."""
        if not self._ended.is_set():
            self._touch()
        self._stop()

    def _stop(self) -> None:
        self._ended.set()
        if self._pulse:
            self._pulse.join()

    def _beat(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            self._touch()

    def _touch(self) -> None:
        """A time of fixed width, written over the one before: a kill leaves one or the other."""
        if self.write:
            with contextlib.suppress(OSError):
                handle = os.open(self.folder / ALIVE, os.O_CREAT | os.O_WRONLY, 0o644)
                try:
                    os.write(handle, f"{self.meter.now():017.6f}".encode())
                finally:
                    os.close(handle)

    def _save(self) -> None:
        """bill.json, whole by rename and not synced. A disk that refuses does not stop training: manifests hold the bill."""
        if not self.write:
            return
        body = {"bill": self.bill.stored(), "settled": self.settled, "held": {self.meter.unit: self.held}}
        temporary = self.folder / f".tmp-{FILE}-{os.getpid()}"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(body), "utf-8")
            os.replace(temporary, self.folder / FILE)
        if not self._ended.is_set():
            self._touch()


def total(bills: Iterable[Usage], unit: str) -> Amount:
    """Several bills as one amount."""
    out = Amount()
    for bill in bills:
        out = out.plus(bill.total(unit))
    return out


def of_stage(folder: Path, manifest: Mapping[str, Any] | None) -> Usage | None:
    """The bill of a stage as far as it is known: its newest, of a checkpoint's manifest or of bill.json; None for none."""
    journal, found = _journal(folder), []
    if manifest and manifest.get("bill"):
        found.append(Usage.of(manifest["bill"]))
    if journal:
        found.append(journal[0])
    return max(found, key=lambda bill: bill.until, default=None)


def _resumed(
    manifest: Mapping[str, Any] | None, journal: tuple[Usage, int, Usage, dict] | None, alive: float | None
) -> Usage:
    """The bill to go on with: what the checkpoint stands for, and as stalled what was spent after it until the kill."""
    step = manifest["step"] if manifest else 0
    kept = Usage({}, from_nimg=manifest["nimg"] if manifest else 0)
    if manifest and manifest.get("bill"):
        kept = Usage.of(manifest["bill"])
    if journal is None:
        return kept
    last, settled_step, settled, held = journal
    if settled_step == step:  # of the same checkpoint, with what writing it took and with earlier kills
        kept = settled
    out = kept
    for unit, amount in last.lost(kept).items():
        out = out.plus(unit, {"stalled": amount}, last.until)
    unseen_s = 0.0 if alive is None else max(0.0, alive - max(last.until, kept.until))
    for unit, count in held.items():
        if unseen_s:
            out = out.plus(unit, {"stalled": Amount(unseen_s * count, None, unseen_s * count)}, alive or 0.0)
    return out


def _journal(folder: Path) -> tuple[Usage, int, Usage, dict[str, int]] | None:
    """bill.json: the newest bill, the step of its last checkpoint, the bill then, unit -> devices held."""
    try:
        body = json.loads((folder / FILE).read_text("utf-8"))
        settled = body["settled"]
        return Usage.of(body["bill"]), int(settled["step"]), Usage.of(settled["bill"]), dict(body["held"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _alive(folder: Path) -> float | None:
    """When a process that did not end its account is last known to have lived."""
    try:
        return float((folder / ALIVE).read_text("ascii"))
    except (OSError, ValueError):
        return None
