"""What a run's small files say of it: stages, figures, hours, sizes. No checkpoint is hashed, no data are opened.

For `cmt runs ls | show | compare`: a hundred small runs take about two seconds of one core. A stage is found in the run or,
where it was not trained there, in the run that it was taken from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run, Stage
from cmt_fast.report.judged import FIGURES
from cmt_fast.run import folder as folder_
from cmt_fast.storage import checkpoint, heartbeat, metrics_log, pruning
from cmt_fast.usage import ledger
from cmt_fast.usage.ledger import Usage

DEPTH = 3  # folders in which runs are looked for


class Figures(NamedTuple):
    """Of one network. steps: number of steps as text -> figures by name, None: not finite; n: samples; final: of a finished
    stage, by `cmt report`, else of an evaluation in training; key: what they depend on, as figures.json has it.
    """

    steps: dict[str, dict[str, Any] | None]
    n: int
    final: bool
    key: dict[str, Any]
    left_out: dict[str, Any]

    def of(self, k: int | str) -> dict[str, Any] | None:
        """Those of k steps, with what intervals are made of."""
        found = self.steps.get(str(k))
        return {**found, "left_out": self.left_out.get(str(k), {})} if found else None


class Standing(NamedTuple):
    """How far a stage is. own: trained or imported in this run; state: `finished`, `40 %`, `not begun`, or what is damaged."""

    name: str
    stage: Stage
    folder: Path
    own: bool
    state: str
    nimg: int
    done: bool
    manifest: dict[str, Any] | None
    figures: Figures | None
    bill: Usage | None


class Known(NamedTuple):
    """A run. about: its run.json; bytes: of its files; changed: when it last did something, Unix seconds; age_s: of its heart."""

    folder: Path
    run: Run
    about: dict[str, Any]
    stages: dict[str, Standing]
    bytes: int
    changed: float
    age_s: float | None

    @property
    def finished(self) -> bool:
        """Whether all stages of its recipe are."""
        return all(s.done for s in self.stages.values())

    @property
    def alive(self) -> bool:
        """Whether something worked on it lately and it is not finished."""
        return not self.finished and self.age_s is not None and self.age_s < heartbeat.DEAD_S

    @property
    def last(self) -> Standing | None:
        """The stage whose figures stand for the run: the furthest that has any, the control last."""
        judged = [s for s in self.stages.values() if s.figures and s.figures.steps]
        students = [s for s in judged if s.name in ("mid", "post")]
        return students[-1] if students else judged[0] if judged else None

    @property
    def hours(self) -> dict[str, float]:
        """Device-hours that were spent in this run, by unit (gpu, core)."""
        out: dict[str, float] = {}
        for s in self.stages.values():
            for unit in s.bill.amounts if s.bill and s.own else ():
                out[unit] = out.get(unit, 0.0) + s.bill.total(unit).hours if s.bill else 0.0
        return out

    @property
    def images(self) -> int:
        """Images that its own stages have seen."""
        return sum(s.nimg for s in self.stages.values() if s.own)


def read(folder: Path) -> Known:
    """One run. Raises ConfigError, one line, for a folder that is none or whose run.json is damaged."""
    run = folder_.stored_run(folder)
    try:
        about, parents = folder_.about_run(folder), folder_.parents_of(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"RUN: {folder / folder_.RUN_FILE} cannot be read ({error})") from None
    stages = {name: _standing(run, folder, parents, name) for name in run.stages}
    found, watched = list(pruning.walk(folder)), ("manifest.json", heartbeat.HEARTBEAT, metrics_log.METRICS)
    times = [stat.st_mtime for path, stat in found if path.name in (*watched, folder_.RUN_FILE, FIGURES)]
    size = sum(stat.st_size for _, stat in found)
    return Known(folder, run, about, stages, size, max(times, default=0.0), heartbeat.age(folder))


def _standing(run: Run, folder: Path, parents: Path | None, name: str) -> Standing:
    stage, where, own = run.stages[name], folder / name, True
    if parents and not checkpoint.steps(where) and checkpoint.steps(parents / name):
        where, own = parents / name, False
    manifest, wrong = _newest(where)
    rows = metrics_log.read(where / metrics_log.METRICS) if where.is_dir() else []
    rows = [row for row in rows if isinstance(row, dict)]
    nimg = max([int(row.get("nimg", 0)) for row in rows[-1:]] + [manifest["nimg"] if manifest else 0])
    done = bool(manifest and manifest.get("done"))
    state = "finished" if done else f"{nimg / stage.images_nimg:.0%}" if nimg else "not begun"
    if wrong:  # an older checkpoint serves where there is one
        state = f"{state}; damaged: {wrong}" if manifest else f"damaged: {wrong}"
    figures = _judged((folder / name, where), manifest) or _evaluated(rows, run.eval.n_during)
    try:
        bill = ledger.of_stage(where, manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        bill = None
    return Standing(name, stage, where, own, state, nimg, done, manifest, figures, bill)


def _newest(stage: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of the newest checkpoint whose files have their sizes, and what is wrong with one that has not."""
    wrong = ""
    for step in reversed(checkpoint.steps(stage)):
        folder = checkpoint.folder_of(stage, step)
        try:
            manifest = checkpoint.read_manifest(folder)
            bad = [n for n, f in manifest["files"].items() if pruning.size((folder / n).resolve()) != f["bytes"]]
            if not bad and isinstance(manifest["nimg"], int):
                return manifest, wrong
            wrong = wrong or f"{folder.name}/{bad[0]} is missing or has another size"
        except (checkpoint.CheckpointError, KeyError, TypeError) as error:
            wrong = wrong or f"{folder.name}: {str(error).partition(': ')[2] or error}"
    return None, wrong


def _judged(folders: tuple[Path, ...], manifest: dict[str, Any] | None) -> Figures | None:
    """What `cmt report` found of these weights, whatever it asked for."""
    for file in dict.fromkeys(folder / FIGURES for folder in folders):
        try:
            stored = json.loads(file.read_text("utf-8"))
            key = stored["key"]
            if manifest and key["ema"] == checkpoint.ema_sum(manifest):
                left_out = stored.get("left_out", {}).get("few", {})
                return Figures(_plain(stored["few"]), int(key["eval"]["n"]), True, key, left_out)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _evaluated(rows: list[dict[str, Any]], n: int) -> Figures | None:
    """The last evaluation in training."""
    for row in reversed(rows):
        if row.get("kind") == "eval" and isinstance(row.get("steps"), dict):
            return Figures(_plain(row["steps"]), n, False, {}, {})
    return None


def _plain(steps: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Figures by name, what is no number left out."""
    numbers = lambda of: {k: v for k, v in of.items() if isinstance(v, int | float)}
    return {str(k): numbers(of) if of else None for k, of in steps.items()}


def find(folder: Path) -> tuple[list[Known], list[tuple[Path, str]]]:
    """The runs in a folder, or the one that it is; and folders that are none, each with what is wrong.

    Raises ConfigError where there is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"FOLDER: {str(folder)!r} is no folder; runs are in ./runs unless --out said otherwise")
    runs: list[Known] = []
    others: list[tuple[Path, str]] = []
    _look(folder, DEPTH, runs, others)
    return runs, others if others != [(folder, NO_RUN)] else []


NO_RUN = f"no run, it has no {folder_.RUN_FILE}"


def _look(folder: Path, depth: int, runs: list[Known], others: list[tuple[Path, str]]) -> None:
    """A run is not looked into; a folder that holds none, however deep, is one line."""
    if (folder / folder_.RUN_FILE).exists():
        try:
            return runs.append(read(folder))
        except (ConfigError, OSError, UnicodeError) as error:
            return others.append((folder, " ".join(str(error).removeprefix("RUN: ").split())))
    try:
        inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if depth else []
    except OSError as error:
        return others.append((folder, f"cannot be read ({error.strerror})"))
    before, below = len(runs), list[tuple[Path, str]]()
    for path in inner:
        _look(path, depth - 1, runs, below)
    told = [(path, why) for path, why in below if why != NO_RUN]
    if len(runs) > before or told or depth == DEPTH:
        others += below
    else:
        others.append((folder, NO_RUN))
