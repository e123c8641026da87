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
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmt_fast.runtime import distributed
from cmt_fast.storage import files, sound
from cmt_fast.usage import bills
from cmt_fast.usage.bills import ALIVE, FILE, Amount, Usage
from cmt_fast.usage.meters import Meter

PULSE_S = 5.0


class Account:
    """The bill of one stage while it trains. Every rank makes every call; `write`: one of them keeps the files."""

    def __init__(
        self, folder: Path, meter: Meter, manifest: Mapping[str, Any] | None, write: bool, pulse_s: float | None = None
    ) -> None:
        """manifest: of the checkpoint that is gone on from. pulse_s: 0 writes bill.alive only when the bill is."""
        self.folder, self.meter, self.write = folder, meter, write
        journal = _journal(folder, write)
        # from here on this process counts, and not the time in which there was none
        alive = bills.alive(folder)
        if alive is None and write and os.path.lexists(folder / ALIVE):
            sound.aside(folder / ALIVE, "is damaged, the time before the last kill is not billed")
        if alive is not None:  # what this process has spent, as on a start from a damaged file, is its meter's to count
            alive = min(alive, meter.begun)
        self.bill = _resumed(manifest, journal, alive)._replace(until=meter.until)
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

    def stands(self, step: int, bill: Mapping[str, Any]) -> None:
        """A checkpoint of `step`, written while steps went on, is on disk: nothing of the bill at its save can be lost."""
        self.settled = {"step": step, "bill": dict(bill)}
        self._save()

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
            with contextlib.suppress(OSError, sound.Unsound):
                handle = sound.handle(self.folder / ALIVE, os.O_CREAT | os.O_WRONLY)
                try:
                    os.write(handle, bills.pulse(self.meter.now()))
                finally:
                    os.close(handle)

    def _save(self) -> None:
        """bill.json, whole by rename and not synced. A disk that refuses does not stop training: manifests hold the bill."""
        if not self.write:
            return
        body = {
            "stage": self.folder.name,
            "bill": self.bill.stored(),
            "settled": self.settled,
            "held": {self.meter.unit: self.held},
        }
        with contextlib.suppress(OSError):
            files.write_bytes(self.folder / FILE, sound.signed(body).encode())
        if not self._ended.is_set():
            self._touch()


def _journal(folder: Path, write: bool) -> tuple[Usage, int, Usage, dict[str, int]] | None:
    """What bill.json says; a damaged one is put aside: the bill of the checkpoint's manifest stands for it."""
    try:
        return bills.checked(folder)
    except sound.Unsound as error:
        if write:
            sound.aside(error.file, f"{error.why}, the bill of the last checkpoint counts")
    except OSError:
        pass
    return None


def _resumed(
    manifest: Mapping[str, Any] | None, journal: tuple[Usage, int, Usage, dict] | None, alive: float | None
) -> Usage:
    """The bill to go on with: what the checkpoint stands for, and as stalled what was spent after it until the kill."""
    step = manifest["step"] if manifest else 0
    kept = Usage({}, from_nimg=manifest["nimg"] if manifest else 0)
    kept = bills.billed(manifest) or kept
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
