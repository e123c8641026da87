"""Runs parts against the clock: each a process group of its own, stopped as a group at its limit, its rows kept whatever it did.

A part's limit is its share of what is left, by the seconds that parts ask for; so time that one does not use goes to those after
it. It is told a little less than its limit, so that it ends by itself and names what it did not come to; where it does not,
SIGTERM and then SIGKILL end it and everything that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness.gpu_suite.parts import Part, Sitting
from bench.harness.results_file import ROOT, write_json
from bench.harness.worker import environment, signal_name

GRACE_S = 8.0  # between SIGTERM and SIGKILL
EVERY_S = 1.0
LARGEST = 15 * 2**20  # bytes of a file that is brought along
SPARE = 0.06, 20.0  # of its limit, and at most so many seconds, that a part is not told of


class Files:
    """The results of all parts as they stand: each in its file, and where `out` is given all in one beside the log."""

    def __init__(self, facts: dict[str, Any], work: Path, log: Path, out: Path | None) -> None:
        self.facts, self.work, self.log, self.out = facts, work, log, out
        self.summary: dict[str, Any] = facts | {"parts": {}}
        self.seen: dict[str, int] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()

    def read(self, part: str) -> dict[str, Any]:
        """What a part has written, empty if nothing."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.work / f"{part}.json").read_text("utf-8"))
        return {}

    def clear(self, part: str) -> None:
        """Rows of an earlier sitting are not this one's."""
        (self.work / f"{part}.json").unlink(missing_ok=True)

    def refresh(self, parts: list[str], force: bool = False) -> None:
        """Write the summary; gather the parts' files where one has changed."""
        stamps = {p: (self.work / f"{p}.json").stat().st_mtime_ns for p in parts if (self.work / f"{p}.json").is_file()}
        if not force and stamps == self.seen:
            return
        self.seen = stamps
        write_json(self.work / "summary.json", self.summary)
        if self.out:
            results = {part: self.read(part) for part in parts if part in stamps}
            write_json(self.out / "gpu.json", {"summary": self.summary, "results": results})
            text = self.log.read_bytes()
            (self.out / "gpu.log").write_bytes(text[-LARGEST:])

    def bring(self, folder: Path) -> None:
        """Copy the pages of the trainings."""
        for page in sorted(folder.glob("*.html")) if self.out else []:
            if page.stat().st_size <= LARGEST:
                shutil.copy(page, self.out / page.name)


class Running:
    """A part under way."""

    def __init__(self, part: Part, sitting: Sitting, limit_s: float, alone: bool = True) -> None:
        self.part, self.limit_s, self.begun = part, limit_s, time.monotonic()
        told = limit_s - min(SPARE[0] * limit_s, SPARE[1])
        self.command = [sys.executable, *part.command(sitting, part.name, told / 60)]
        self.path = sitting.scratch / f"{part.name}.log"
        self.shown, self.stopped = 0, False
        env = environment() | {"OUT": str(sitting.scratch)}
        if not alone:  # many processes, and a team of threads in each would stand in the others' way
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
        with self.path.open("w") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def news(self) -> str:
        """What it printed since the last time, in whole lines."""
        with self.path.open("rb") as log:
            log.seek(self.shown)
            new = log.read()
        if self.process.poll() is None:
            new = new[: new.rfind(b"\n") + 1]
        self.shown += len(new)
        return new.decode("utf-8", "replace")

    def stop(self) -> None:
        """End its whole group: SIGTERM, then SIGKILL."""
        for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)
        self.stopped = True

    def status(self) -> str:
        """How it ended."""
        code = self.process.returncode
        if self.stopped:
            return f"stopped at its limit of {self.limit_s:.0f} s"
        if code is not None and code < 0:
            return f"killed by {signal_name(-code)}"
        return "ok" if code == 0 else f"FAILED, exit code {code}"


def rounds(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts in order, those that may run beside each other together."""
    beside: list[Part] = []
    for part in parts:
        if part.beside:
            beside.append(part)
            continue
        if beside:
            yield beside
            beside = []
        yield [part]
    if beside:
        yield beside


def run(
    parts: list[Part], sitting: Sitting, minutes: float, files: Files, lacks: dict[str, list[str]]
) -> dict[str, Any]:
    """The summary, after all parts. lacks: the packages that a part, not among `parts`, would need."""
    end, todo = time.monotonic() + 60 * minutes, list(rounds(parts))
    table = files.summary["parts"]
    for name, packages in lacks.items():
        table[name] = {"status": f"NOT RUN: needs {', '.join(packages)}" if packages else "NOT RUN: no time left"}
    names = [part.name for part in parts]
    for name in names:
        files.clear(name)
    files.refresh(names, force=True)
    with _terminating():
        for i, together in enumerate(todo):
            left = end - time.monotonic()
            asked = [max(part.seconds for part in others) for others in todo[i:]]
            limit = left * asked[0] / sum(asked)
            if limit < 1.0:
                break
            alone = len(together) == 1
            _run_beside([Running(part, sitting, limit, alone) for part in together], files, names)
            files.bring(sitting.scratch / "reports")
    return files.summary


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that its parts are ended too."""

    def raise_(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, raise_)
    except ValueError:  # not the main thread: whoever called has its own way
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_beside(under_way: list[Running], files: Files, names: list[str]) -> None:
    """Wait for parts that run beside each other, showing and keeping what they say."""
    several, everything = len(under_way) > 1, list(under_way)
    for one in under_way:
        files.summary["parts"][one.part.name] = {"status": "under way"}
        print(f"$ [{one.part.name}, at most {one.limit_s:.0f} s] {' '.join(one.command[1:])}", flush=True)
    try:
        while under_way:
            for one in list(under_way):
                done = one.process.poll() is not None
                if not done and one.seconds > one.limit_s:
                    one.stop()
                    done = True
                _say(one, files, several)
                if done:
                    _sum_up(one, files)
                    under_way.remove(one)
            files.refresh(names)
            if under_way:
                time.sleep(EVERY_S if under_way[0].limit_s > 60 else 0.1)
    finally:
        for one in everything:
            with contextlib.suppress(ProcessLookupError):  # what it left behind ends with it
                os.killpg(one.process.pid, signal.SIGKILL)
        for one in under_way:
            one.process.wait()
            files.summary["parts"][one.part.name] = _row(one, files) | {"status": "stopped with the sitting"}
        files.refresh(names, force=True)


def _say(one: Running, files: Files, several: bool) -> None:
    text = one.news()
    if text:
        lines = [f"[{one.part.name}] {line}" if several else line for line in text.splitlines()]
        print("\n".join(lines), flush=True)
        with files.log.open("a") as log:
            log.write("".join(f"[{one.part.name}] {line}\n" for line in text.splitlines()))


def _row(one: Running, files: Files) -> dict[str, Any]:
    got = files.read(one.part.name)
    return {
        "status": one.status(), "seconds": round(one.seconds, 1), "limit_s": round(one.limit_s, 1),
        "rows": len(got.get("rows", [])), "not_measured": got.get("not_measured", []),
        "cannot": [_name(row) for row in got.get("rows", []) if row.get("cannot") or row.get("crash")],
    }  # fmt: skip


def _name(row: dict[str, Any]) -> str:
    """What a row is of, and why it has no figures."""
    keys = ("objective", "model", "how", "op", "case", "name", "backend", "T", "d", "dtype", "precision")
    label = " ".join(str(row[key]) for key in keys if row.get(key) is not None)
    return f"{label}: {row.get('cannot') or row.get('crash')}"[:200]


def _sum_up(one: Running, files: Files) -> None:
    row = files.summary["parts"][one.part.name] = _row(one, files)
    print(f"== {one.part.name}: {row['status']} in {row['seconds']:.0f} s, {row['rows']} rows", flush=True)


def text(summary: dict[str, Any]) -> str:
    """The parts, what each came to, and by name what was not measured."""
    lines = [
        f"{summary['device']}, torch {summary['torch']}, commit {summary['commit']}, {summary['minutes']:g} minutes"
    ]
    for name, part in summary["parts"].items():
        figures = f" in {part['seconds']:.0f} s, {part['rows']} rows" if "seconds" in part else ""
        lines.append(f"{name:13} {part['status']}{figures}")
        lines += [f"{'':13}   not measured: {what}" for what in part.get("not_measured", [])]
        lines += [f"{'':13}   no figures: {what}" for what in part.get("cannot", [])[:20]]
    return "\n".join(lines)
