"""Contenders of `bench step`, each in a process of its own: one that runs out of memory, crashes or hangs ends alone.

Each has the card to itself: ours first (the largest batch, half of it, mid-training with the recipe's own points), then the
peer's, from a quarter of it on a GPU, halved until it fits. Then both at the peer's batch, in alternating rounds of two
processes, since no two networks of this size train in one. Compiled steps come last, each only if the time that is left is
likely to suffice. Every row is written at once.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections.abc import Callable
from typing import Any

from bench.harness.results_file import Results
from bench.harness.timing import Deadline, quantiles
from bench.harness.worker import Died, Late, Refused, Worker
from bench.training import runs
from cmt_fast.config import loading

# the block that is compiled for all, assumed: an H100's host took up to 6 s a block when it compiled all 28 (2026-11-26)
COMPILE_S = 30.0
ROUNDS, SLACK_GB = 4, 0.07
ALTERNATING = "medians of {} alternating rounds, two processes"
AFTER = "medians, one process after the other"
EQUAL = "eager beside the peer"
FAULTS = (Died, Late, Refused)


class Side:
    """One contender at a time in a worker, which is started anew where it has to be."""

    def __init__(self, m: runs.Model, arguments: argparse.Namespace, deadline: Deadline) -> None:
        self.m, self.arguments, self.deadline = m, arguments, deadline
        self.worker: Worker | None = None
        self.loaded: dict[str, Any] = {}

    def ask(self, **message: Any) -> dict[str, Any]:
        """Whatever fails, the next call finds a worker that can be asked. Raises Died, Late or Refused."""
        self.worker = self.worker or Worker("bench.training.contender")
        try:
            return self.worker.ask(message, max(1.0, self.deadline.left_s))
        except FAULTS as fault:
            if not (isinstance(fault, Refused) and fault.usable):
                self.stop()
            raise

    def load(self, objective: str, how: str, precision: str) -> dict[str, Any]:
        """A contender of an objective; in a fresh process where the last one left something."""
        self.loaded = {"objective": objective, "model": list(self.m), "how": how, "precision": precision,
                       "device": self.arguments.device, "points": None, "more": runs.more(self.arguments)}  # fmt: skip
        got = self.ask(do="load", **self.loaded)
        if got["still_gb"] > SLACK_GB:
            self.stop()
            got = self.ask(do="load", **self.loaded)
        return got

    def fit(self, batch: int, points: int | None = None) -> dict[str, Any]:
        """The largest of batch, half, a quarter, ... that memory allows; a fresh process where what failed stays in memory
        or the system killed it."""
        tried = []
        while True:
            try:
                got = self.ask(do="fit", batch=batch, points=points)
                return got | {"tried": tried + got["tried"]}
            except Refused as fault:
                if "batch" not in fault.reply:
                    raise
                tried, batch = [*tried, batch], fault.reply["batch"]
            except Died as fault:
                if fault.signal != signal.SIGKILL or batch < 2:
                    raise
                tried, batch = [*tried, batch], batch // 2
            self.ask(do="load", **self.loaded)

    def turns(self, seconds: float, least: int) -> dict[str, Any]:
        """Times of steps."""
        n = 256 if self.arguments.tiny else 8192 if self.arguments.device == "cuda" else 1024
        most = max(least, min(50, 200 if seconds else 1))
        return self.ask(do="turns", least=least, most=most, seconds=seconds, square=n)

    def stop(self) -> None:
        if self.worker:
            self.worker.kill()
        self.worker = None

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None


def first_of_peer(batch: int, device: str) -> int:
    """The batch that the peer is first asked for. Published steps of an XL ran out of an H100's memory at 32 rows: there
    larger ones would cost a process each to say so."""
    return min(batch, max(16, batch // 4)) if device == "cuda" else batch


class Apart:
    """All objectives of one model. make_row(objective, model, how, precision, fitted, times) -> a row of the table."""

    def __init__(
        self, m: runs.Model, arguments: argparse.Namespace, results: Results, show: Callable, make_row: Callable
    ) -> None:
        self.m, self.arguments, self.results, self.show, self.make_row = m, arguments, results, show, make_row
        self.seconds = arguments.seconds if arguments.seconds is not None else 3.0
        self.least = 2 if arguments.tiny else 5
        self.compile_s: float | None = None

    def run(self, names: list[str], deadline: Deadline) -> None:
        """Eager steps of every objective, each with its share of the time, then compiled ones."""
        ours, theirs = (Side(self.m, self.arguments, deadline) for _ in range(2))
        compiles = [n for n in names if self.arguments.compile and (n == "MF" or not self.arguments.tiny)]
        self.results.plan(self.name(n, how) for n in names for how in ("eager", "peer", EQUAL))
        self.results.plan(self.name(n, "compiled") for n in compiles)
        try:
            for i, name in enumerate(names):
                share = Deadline(min(deadline.left_s, 1e6) / (len(names) - i) / 60)
                ours.deadline = theirs.deadline = share
                self.eager(name, ours, theirs)
            ours.close(), theirs.close()
            ours.deadline = deadline
            for name in compiles:
                self.compiled(name, ours)
        finally:
            ours.stop(), theirs.stop()

    def name(self, objective: str, how: str) -> str:
        """What a reader of the summary is told was measured or not."""
        return f"{objective} {self.m.name} {how}"

    def precision(self, name: str) -> str:
        return "bf16" if runs.OBJECTIVES[name].bf16 and self.arguments.device == "cuda" else "fp32"

    def batches(self) -> list[int]:
        """What is tried of ours: twice the usual batch first, where no batch was asked for."""
        return [self.m.batch] if self.arguments.batch or self.arguments.tiny else [2 * self.m.batch, self.m.batch]

    def attempt(self, label: tuple[str, str, str, int], call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `call` gives; where it cannot, a row that says why and None."""
        name, how, precision, batch = label
        try:
            return call()
        except Late as fault:
            self.results.skip(self.name(name, how), f"batch {batch}, {fault}")
        except (Died, Refused) as fault:
            base = {"objective": name, "model": self.m.name, "tokens": self.m.tokens, "width": self.m.width}
            row = base | {"depth": self.m.depth, "batch": batch, "how": how, "precision": precision}
            self.write(row | {"cannot": str(fault)})
            self.results.done(self.name(name, how))
        return None

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        self.results.add(row)
        print(self.show(row), flush=True)
        return row

    def timed(
        self, side: Side, name: str, how: str, precision: str, batch: int, points: int | None = None
    ) -> dict[str, Any] | None:
        """Fit, time and write one row; None where it cannot be."""

        def call() -> dict[str, Any]:
            fitted = side.fit(batch, points)
            return self.make_row(name, self.m, how, precision, fitted, side.turns(self.seconds, self.least))

        if side.deadline.over:
            return None
        row = self.attempt((name, how, precision, batch), call)
        if row:
            self.results.done(self.name(name, how))
        return self.write(row) if row else None

    def eager(self, name: str, ours: Side, theirs: Side) -> None:
        """Rows of ours, of the peer, and of both at the peer's batch."""
        precision, rows = self.precision(name), []
        label = (name, "eager", precision, self.m.batch)
        theirs.stop()
        if self.attempt(label, lambda: ours.load(name, "eager", precision)):
            for batch in self.batches():
                if rows and rows[-1]["batch"] <= batch:  # the one before was halved as far
                    continue
                row = self.timed(ours, name, "eager", precision, batch)
                rows += [row] if row else []
            own = loading.load(runs.OBJECTIVES[name].recipe).stages[runs.OBJECTIVES[name].stage].trajectories
            if own and name.startswith("CMT") and rows:
                how, points = "eager, recipe's points", own.per_trajectory
                row = self.timed(ours, name, how, precision, rows[-1]["batch"], points)
                rows += [row] if row else []
        ours.stop()
        label = (name, "peer", precision, self.m.batch)
        if theirs.deadline.over or not self.attempt(label, lambda: theirs.load(name, "peer", precision)):
            return
        peer = self.timed(theirs, name, "peer", precision, first_of_peer(self.m.batch, self.arguments.device))
        if not peer:
            return
        for row in rows:
            row["over_peer"], row["over_peer_by"] = {precision: after(peer, row)}, AFTER
        self.results.write()
        self.equal(name, precision, ours, theirs, peer, rows)

    def equal(self, name: str, precision: str, ours: Side, theirs: Side, peer: dict, rows: list[dict]) -> None:
        """Both at the peer's batch, in alternating rounds."""
        batch, label = peer["batch"], (name, EQUAL, precision, peer["batch"])

        def call() -> dict[str, Any]:
            ours.load(name, "eager", precision)
            fitted, mine, other = ours.fit(batch), [], []
            if fitted["batch"] != batch:
                raise Refused({"failed": f"{batch} rows do not fit beside the peer's"})
            for _ in range(1 if self.arguments.tiny else ROUNDS):
                mine.append(ours.turns(0.0, self.least))
                other.append(theirs.turns(0.0, self.least))
            row = self.make_row(name, self.m, "eager", precision, fitted, joined(mine))
            ratios = [statistics.median(b["ms"]) / statistics.median(a["ms"]) for a, b in zip(mine, other)]
            over = dict(zip(("p20", "p50", "p80"), quantiles(ratios)))
            return row | {"over_peer": {precision: over}, "over_peer_by": ALTERNATING.format(len(mine))}

        if not rows or ours.deadline.over:
            return
        row = self.attempt(label, call)
        if row:
            self.results.done(self.name(name, EQUAL))
        there = next((r for r in rows if r["batch"] == batch and r["how"] == "eager"), None)
        if row and there:
            there |= {key: row[key] for key in ("over_peer", "over_peer_by")}
            self.results.write()
            print(self.show(there), flush=True)
        elif row:
            self.write(row)

    def compiled(self, name: str, side: Side) -> None:
        """A compiled step of ours, if it is likely to be ready in time."""
        precision, batch = self.precision(name), self.m.batch
        need = 1.2 * self.compile_s if self.compile_s else COMPILE_S * (self.arguments.device == "cuda")
        if side.deadline.left_s < need + 20:
            self.results.skip(self.name(name, "compiled"), f"compiling may take {need:.0f} s")
            return
        if not self.attempt((name, "compiled", precision, batch), lambda: side.load(name, "compiled", precision)):
            return
        row = self.timed(side, name, "compiled", precision, batch)
        side.close()
        if not row:
            return
        self.compile_s = row["compile_s"]
        found = [r for r in self.results["rows"] if r["objective"] == name and r["how"] == "peer" and "p50_ms" in r]
        if found:
            row["over_peer"], row["over_peer_by"] = {precision: after(found[-1], row)}, AFTER
            self.results.write()


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The turns of several rounds as one."""
    lists = {key: [x for part in parts for x in part[key]] for key in ("ms", "host_ms", "square_ms")}
    return lists | {"rounds_ms": parts[-1]["rounds_ms"], "pool_steps": parts[-1]["pool_steps"]}


def after(peer: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """The peer's over ours per image, of medians; p20 and p80 are the widest that the spreads of both allow."""
    scale = ours["batch"] / peer["batch"]
    pairs = {"p20": ("p20_ms", "p80_ms"), "p50": ("p50_ms", "p50_ms"), "p80": ("p80_ms", "p20_ms")}
    return {key: scale * peer[a] / ours[b] for key, (a, b) in pairs.items()}
