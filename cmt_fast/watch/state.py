"""How far a run is, from the files that it keeps while it trains.

RUN/run.json           the stages and their lengths          STAGE/metrics.jsonl    speed, loss, evaluations
RUN/heartbeat          when it last did something            STAGE/bill.alive       when its process last lived
STAGE/checkpoints/     what is finished
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.run.folder import RUN_FILE, is_run, meant, parents_of, stored_run
from cmt_fast.runtime import words
from cmt_fast.storage.heartbeat import DEAD_S, HEARTBEAT, QUIET_S
from cmt_fast.watch.tail import Tail

RECENT = 10  # rows of metrics over which speed is taken
PULSE_S = 60.0  # after which a process that writes bill.alive every 5 s is gone
AHEAD_S = 60.0  # by which clocks of two machines may differ
SIZE_S = 60.0  # between two counts of the folder's bytes


class StageState(NamedTuple):
    """One stage. state: "done", "begun" or "waiting"; speed: images/s of training; left_s: at the pace of the last rows, its
    evaluations too; evaluations: steps of the sampler -> (images, distance); elsewhere: the run that it was taken from.
    """

    name: str
    state: str
    nimg: int
    total_nimg: int
    speed: float | None = None
    left_s: float | None = None
    spent_s: float = 0.0
    devices: dict[str, float] = {}
    losses: list[float] = []
    evaluations: dict[str, list[tuple[int, float]]] = {}
    elsewhere: str = ""

    @property
    def share(self) -> float:
        """What of it is trained, 0 to 1."""
        return 1.0 if self.state == "done" else min(1.0, self.nimg / max(1, self.total_nimg))


class RunState(NamedTuple):
    """A run at one moment. life: one phrase, mood: "good", "waiting" or "bad"; teacher: steps of the solver, and its distance;
    changed: when anything of it was last written, Unix time.
    """

    name: str
    folder: Path
    stages: list[StageState]
    steps: tuple[int, ...]
    distance: str
    life: str
    mood: str
    teacher: tuple[int, float] | None
    bytes: int
    changed: float

    @property
    def finished(self) -> bool:
        """Whether every stage is."""
        return all(s.state == "done" for s in self.stages)

    @property
    def now(self) -> StageState | None:
        """The stage that is trained, or would go on; None between two."""
        return next((s for s in reversed(self.stages) if s.state == "begun"), None)


class Watched:
    """A run that is looked at again and again. Raises ConfigError where the folder holds no run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.parents = folder, stored_run(folder), parents_of(folder)
        self.tails: dict[Path, Tail] = {}
        self._bytes, self._counted = 0, float("-inf")

    def look(self, clock: float | None = None) -> RunState:
        """What its files say now. clock: Unix time, for tests."""
        now = time.time() if clock is None else clock
        stages = [self._stage(name) for name in self.run.stages]
        life, mood = self._life(stages, now)
        e, run = self.run.eval, self.run
        distance = f"Fréchet distance{'' if e.metric == 'frechet' else f' ({e.metric})'}, {e.n_during:,} samples"
        steps, teacher = tuple(e.steps), self._teacher(run.sampler.teacher_steps)
        return RunState(
            run.name, self.folder, stages, steps, distance, life, mood, teacher, self._size(now), self._changed()
        )

    def _place(self, name: str) -> Path:
        """The stage's folder, here or where the run's parents are."""
        own = self.folder / name
        if self.parents and not (own / "metrics.jsonl").is_file() and not manifests(own):
            return self.parents / name
        return own

    def _stage(self, name: str) -> StageState:
        place, total = self._place(name), self.run.stages[name].images_nimg
        rows = self.tails.setdefault(place, Tail(place / "metrics.jsonl")).read()
        found = manifests(place)
        manifest = _json(found[-1]) if found else {}
        train = [row for row in rows if row["kind"] == "train"]
        elsewhere = "" if place.parent == self.folder else str(place.parent)
        nimg = max(train[-1]["nimg"] if train else 0, manifest.get("nimg", 0))
        state = "done" if manifest.get("done") else ("begun" if train or place.is_dir() else "waiting")
        if not train:
            return StageState(name, state, nimg, total, elsewhere=elsewhere)
        speed, left = _pace(train, rows[-1], total)
        wall = train[-1]["wall"]
        bill = (wall.get("bill") or {}).get("amounts", {})
        return StageState(
            name, state, nimg, total, speed, left,
            spent_s=wall["train_s"] + wall["eval_s"],
            devices={unit: sum(a["seconds"] for a in phases.values()) for unit, phases in bill.items()},
            losses=[row["loss"] for row in train],
            evaluations=_evaluations(rows),
            elsewhere=elsewhere,
        )  # fmt: skip

    def _teacher(self, steps: int) -> tuple[int, float] | None:
        """The teacher as it was judged beside evaluations in training; None before a report has judged it."""
        figures = (_json(self._place("pre") / "figures.json").get("during") or {}).get(str(steps))
        return (steps, figures["frechet"]) if figures else None

    def _life(self, stages: list[StageState], now: float) -> tuple[str, str]:
        """Whether it lives, in a phrase, and how good that is."""
        beat = _time(self.folder / HEARTBEAT)
        if all(s.state == "done" for s in stages):
            last = max((_time(m) for s in stages for m in manifests(self._place(s.name))), default=now)
            return f"finished {words.age(now - last)} ago", "good"
        if not beat:
            return "has not been alive yet", "waiting"
        age = now - beat
        pulses = [_time(self.folder / s.name / "bill.alive") for s in stages if s.state == "begun"]
        ahead = max(beat, *pulses, 0.0) - now
        if ahead > AHEAD_S:
            return f"its last sign of life is {words.age(ahead)} ahead of this clock", "waiting"
        pulse = now - max(pulses) if any(pulses) else None
        if pulse is not None and pulse < PULSE_S:
            if age < DEAD_S:
                return f"alive {words.age(min(age, pulse))} ago", "good"
            return f"its process lives, but has done nothing for {words.age(age)}", "bad"
        if age < QUIET_S:
            return f"alive {words.age(age)} ago", "good"
        if pulse is None:
            return f"stopped {words.age(age)} ago; the same `cmt train` goes on", "waiting"
        hint = f": `cmt doctor --heartbeat {self.folder}`" if age > DEAD_S else ""
        return f"no sign of life for {words.age(age)}{hint}", "bad" if hint else "waiting"

    def _size(self, now: float) -> int:
        """Bytes of the folder, counted again after SIZE_S."""
        if now - self._counted > SIZE_S:
            self._bytes, self._counted = sum(_sizes(self.folder)), now
        return self._bytes

    def _changed(self) -> float:
        """When a row of metrics or a checkpoint came last."""
        places = [self._place(name) for name in self.run.stages]
        return max(_time(f) for p in places for f in (p / "metrics.jsonl", *manifests(p)[-1:], p / "grids", p))


def runs_in(folder: Path) -> list[Path]:
    """The folder, where it is a run, or the runs that lie in it. Raises ConfigError for neither."""
    if is_run(folder):
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{RUN_FILE}"))
    if not found:
        why = f"is no run, it has no {RUN_FILE}, nor has a folder in it{meant(folder)}"
        raise ConfigError(f"RUN: {str(folder)!r} {why}")
    return found


def manifests(stage: Path) -> list[Path]:
    """Those of its checkpoints, the newest last; whether files are whole is not looked at."""
    return sorted(stage.glob("checkpoints/step-*/manifest.json"))


def _pace(train: list[dict], last: dict, total: int) -> tuple[float | None, float | None]:
    """Images/s of training over the last rows, and seconds to the end of the stage, with evaluations as often as so far."""
    recent = train[-RECENT - 1 :]
    first, end = (recent[0], recent[-1]) if len(recent) > 1 else (None, recent[-1])
    nimg, seconds = end["nimg"], end["wall"]["train_s"]
    if first:
        nimg, seconds = nimg - first["nimg"], seconds - first["wall"]["train_s"]
    if seconds <= 0 or nimg <= 0:
        return None, None
    whole = end["wall"]["train_s"]
    slower = (whole + end["wall"]["eval_s"]) / whole if whole else 1.0
    return nimg / seconds, (total - end["nimg"]) * seconds / nimg * slower


def _evaluations(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for k, figures in row["steps"].items() if row["kind"] == "eval" else ():
            if figures:
                out.setdefault(k, []).append((row["nimg"], figures["frechet"]))
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _time(path: Path) -> float:
    """When it was last written; 0 where it is not."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _sizes(folder: Path) -> Iterator[int]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(Path(entry.path))
                else:
                    yield entry.stat(follow_symlinks=False).st_size
    except OSError:  # removed meanwhile, as old checkpoints are
        return
