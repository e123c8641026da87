"""What a run's small files say of it: stages, figures, hours, sizes. No checkpoint is hashed, no data are opened, no torch.

For `cmt runs ls | show | compare`: a hundred small runs take about two seconds of one core. A stage is found in the run or,
where it was not trained there, in the run that it was taken from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.report.figures import FIGURES, Figures, plain, stored
from cmt_fast.run import folder as folder_
from cmt_fast.run import standing
from cmt_fast.run.standing import Life, Standing
from cmt_fast.storage import heartbeat, metrics_log, pruning
from cmt_fast.storage.record import Record

DEPTH = 3  # folders in which runs are looked for


class Newest(NamedTuple):
    """The newest figures of one network. steps: number of steps as text -> figures by name, None: not finite; n: samples;
    final: of a finished stage, by `cmt report`, else of an evaluation in training; key: what they depend on, as figures.json
    has it.
    """

    steps: dict[str, Figures | None]
    n: int
    final: bool
    key: dict[str, Any]
    left_out: dict[str, Any]

    def of(self, k: int | str) -> Figures | None:
        """Those of k steps, with what intervals are made of."""
        found = self.steps.get(str(k))
        return {**found, "left_out": self.left_out.get(str(k), {})} if found else None


class Known(NamedTuple):
    """A run. about: its run.json; figures: of stages that have any; bytes: of its files; changed: when it last did something,
    Unix seconds.
    """

    folder: Path
    run: Run
    about: dict[str, Any]
    stages: dict[str, Standing]
    figures: dict[str, Newest]
    life: Life
    bytes: int
    changed: float

    @property
    def last(self) -> str | None:
        """The stage whose figures stand for the run: the furthest that has any, the control last."""
        judged = [name for name in self.stages if name in self.figures and self.figures[name].steps]
        students = [name for name in judged if name in ("mid", "post")]
        return students[-1] if students else judged[0] if judged else None

    @property
    def hours(self) -> dict[str, float]:
        """Device-hours that were spent in this run, by unit (gpu, core)."""
        out: dict[str, float] = {}
        for s in self.stages.values():
            for unit, hours in s.hours.items() if s.own else ():
                out[unit] = out.get(unit, 0.0) + hours
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
    stages = {name: standing.of(run, folder, parents, name, Record.newest) for name in run.stages}
    figures = {name: f for name, s in stages.items() if (f := _figures(run, folder, s))}
    found, watched = list(pruning.walk(folder)), ("manifest.json", heartbeat.HEARTBEAT, metrics_log.METRICS)
    times = [stat.st_mtime for path, stat in found if path.name in (*watched, folder_.RUN_FILE, FIGURES)]
    size, life = sum(stat.st_size for _, stat in found), standing.life(folder, stages.values(), time.time())
    return Known(folder, run, about, stages, figures, life, size, max(times, default=0.0))


def _figures(run: Run, folder: Path, s: Standing) -> Newest | None:
    """What `cmt report` found of these weights, whatever it asked for; else the last evaluation in training."""
    for file in dict.fromkeys(at / FIGURES for at in (folder / s.name, s.folder)):
        found = stored(file)
        if found and s.ema and found[0].get("ema") == s.ema:
            key, judged = found
            return Newest(_plain(judged.few), int(key["eval"]["n"]), True, key, judged.left_out.get("few", {}))
    for row in reversed(s.evaluations):
        return Newest(_plain(row["steps"]), run.eval.n_during, False, {}, {})
    return None


def _plain(steps: dict[str, Any]) -> dict[str, Figures | None]:
    """Figures by name, what is no number left out."""
    return {str(k): plain(of) if of else None for k, of in steps.items()}


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
