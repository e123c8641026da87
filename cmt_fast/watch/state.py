"""How far a run is and how fast it goes, looked at again and again: run/standing.py, and what the last rows say of speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.run import standing
from cmt_fast.run.folder import RUN_FILE, is_run, meant, parents_of, stored_run
from cmt_fast.run.standing import Life, Standing
from cmt_fast.storage import pruning, sound
from cmt_fast.storage.metrics_log import METRICS
from cmt_fast.storage.record import Record

SIZE_S = 60.0  # between two counts of the folder's bytes


class StageState(NamedTuple):
    """One stage. at: where it stands; begun: it has, and is not done; speed: images/s of training; left_s: at the pace of the
    last rows, its evaluations too; evaluations: steps of the sampler -> (images, distance).
    """

    at: Standing
    begun: bool
    speed: float | None = None
    left_s: float | None = None
    spent_s: float = 0.0
    losses: Sequence[float] = ()
    evaluations: dict[str, list[tuple[int, float]]] = {}

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.at.name

    @property
    def waiting(self) -> bool:
        """Whether it has not begun."""
        return not self.begun and not self.at.done


class RunState(NamedTuple):
    """A run at one moment. teacher: steps of the solver, and its distance; changed: when anything of it was last written, Unix
    time.
    """

    name: str
    folder: Path
    stages: list[StageState]
    steps: tuple[int, ...]
    distance: str
    life: Life
    teacher: tuple[int, float] | None
    bytes: int
    changed: float

    @property
    def finished(self) -> bool:
        """Whether every stage is."""
        return all(s.at.done for s in self.stages)

    @property
    def now(self) -> StageState | None:
        """The stage that is trained, or would go on; None between two."""
        return next((s for s in reversed(self.stages) if s.begun), None)


class Watched:
    """A run that is looked at again and again. Raises ConfigError where the folder holds no run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, stored_run(folder)
        self.parents = parents_of(folder)
        self.records: dict[Path, Record] = {}
        self._bytes, self._counted = 0, float("-inf")

    def look(self, clock: float | None = None) -> RunState:
        """What its files say now. clock: Unix time, for tests."""
        now = time.time() if clock is None else clock
        stages = [self._stage(name) for name in self.run.stages]
        at = [s.at for s in stages]
        e, run = self.run.eval, self.run
        distance = f"Fréchet distance{'' if e.metric == 'frechet' else f' ({e.metric})'}, {e.n_during:,} samples"
        steps, teacher = tuple(e.steps), self._teacher(run.sampler.teacher_steps)
        life, changed = standing.life(self.folder, at, now), max(map(_changed, at))
        return RunState(run.name, self.folder, stages, steps, distance, life, teacher, self._size(now), changed)

    def _record(self, file: Path) -> Record:
        return self.records.setdefault(file, Record(file)).update()

    def _stage(self, name: str) -> StageState:
        at = standing.of(self.run, self.folder, self.parents, name, self._record)
        record, begun = at.record, not at.done and at.folder.is_dir()
        if not (record and record.nimg):
            return StageState(at, begun)
        recent = record.recent
        speed, left = _pace(recent, at.stage.images_nimg)
        wall = {"train_s": 0.0, "eval_s": 0.0} | recent[-1].get("wall", {})
        evaluations = _evaluations(at.evaluations)
        return StageState(at, begun, speed, left, wall["train_s"] + wall["eval_s"], record.loss, evaluations)

    def _teacher(self, steps: int) -> tuple[int, float] | None:
        """The teacher as it was judged beside evaluations in training; None before a report has judged it."""
        during = _json(standing.place(self.folder, self.parents, "pre") / "figures.json").get("during")
        figures = during.get(str(steps)) if isinstance(during, dict) else None
        found = figures.get("frechet") if isinstance(figures, dict) else None
        return (steps, found) if isinstance(found, int | float) else None

    def _size(self, now: float) -> int:
        """Bytes of the folder, counted again after SIZE_S."""
        if now - self._counted > SIZE_S:
            self._bytes, self._counted = pruning.size(self.folder), now
        return self._bytes


def runs_in(folder: Path) -> list[Path]:
    """The folder, where it is a run, or the runs that lie in it. Raises ConfigError for neither."""
    if is_run(folder):
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{RUN_FILE}"))
    if not found:
        why = f"is no run, it has no {RUN_FILE}, nor has a folder in it{meant(folder)}"
        raise ConfigError(f"RUN: {str(folder)!r} {why}")
    return found


def _changed(at: Standing) -> float:
    """When a row of metrics, a checkpoint or a picture came last."""
    return max(at.saved, *(standing.written(f) for f in (at.folder / METRICS, at.folder / "grids", at.folder)))


def _pace(recent: list[dict], total: int) -> tuple[float | None, float | None]:
    """Images/s of training over the last rows, and seconds to the end of the stage, with evaluations as often as so far."""
    first, end = (recent[0], recent[-1]) if len(recent) > 1 else (None, recent[-1])
    spent = lambda row, key: row.get("wall", {}).get(key) or 0.0  # a row of another version may not say it
    nimg, seconds = end["nimg"], spent(end, "train_s")
    if first:
        nimg, seconds = nimg - first["nimg"], seconds - spent(first, "train_s")
    if seconds <= 0 or nimg <= 0:
        return None, None
    whole = spent(end, "train_s")
    slower = (whole + spent(end, "eval_s")) / whole if whole else 1.0
    return nimg / seconds, (total - end["nimg"]) * seconds / nimg * slower


def _evaluations(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for k, figures in row["steps"].items():
            if figures and "frechet" in figures:
                out.setdefault(k, []).append((row["nimg"], figures["frechet"]))
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        return sound.read(path)
    except (OSError, ValueError):
        return {}
