"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, behind one door.

metrics.jsonl is the record; a logger is a copy of it for people who look elsewhere. So a logger never decides anything: each
works in a thread of its own, training does not wait for a network, and one that fails is said once and left, but where a disk
is full: then it is opened anew once there is room, and gets what it missed. All stages are
on one axis, the images seen along the path pre -> mid -> post; a stage is a run of its own there, so the control's curve lies
over that of mid- and post-training. Names of projects, addresses and keys come from the libraries' own variables
(WANDB_PROJECT, MLFLOW_TRACKING_URI, ...), and nothing of them is written down here.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cmt_fast.config.errors import one_line
from cmt_fast.config.secrets import hidden
from cmt_fast.storage import files, sound

EXTRAS = {
    "tensorboard": "log",
    "wandb": "wandb",
    "mlflow": "mlflow",
}  # logger, and package of its name -> extra of ours
IDS = "loggers.json"  # STAGE/loggers.json: logger -> the id under which it knows the stage
DRAIN_S = 60.0  # what the end of a stage waits for a logger that lags behind
AGAIN_S = 10.0  # between two tries to open a logger whose disk was full
SURE = 3  # jobs after which one has come to the disk: TensorBoard's thread tells of a failure at the next, or the one after


Rows = Callable[[], Iterable[dict[str, Any]]]  # rows of metrics, read one by one each time that it is called


class Opening(NamedTuple):
    """The stage that is logged. run: the run's name; folder: RUN/STAGE; settings: the run's keys, nested. In images:

    total_nimg: its length; before_nimg: of the stages before it on its path; nimg: of the checkpoint that it goes on from;
    seen_nimg: up to where a process that was killed logged already.
    """

    run: str
    folder: Path
    total_nimg: int = 0
    before_nimg: int = 0
    nimg: int = 0
    seen_nimg: int = 0
    settings: dict[str, Any] = {}

    @property
    def stage(self) -> str:
        """Its name."""
        return self.folder.name


class Logger(Protocol):
    """What a logger does. `at`: images on the common axis; `when`: Unix time of the row."""

    fresh: bool  # nothing of the stage was logged before: rows and pictures that are on disk already are sent to it

    def scalars(self, at: int, values: dict[str, float], when: float) -> None: ...

    def picture(self, at: int, name: str, path: Path, caption: str, when: float) -> None: ...

    def close(self, whole: bool) -> None: ...


def missing(names: Iterable[str]) -> list[tuple[str, str]]:
    """(logger, extra that brings it) of those whose package is not installed."""
    return [(name, EXTRAS[name]) for name in names if importlib.util.find_spec(name) is None]


def flat(kind: str, values: dict[str, Any], wall: dict[str, Any]) -> dict[str, float]:
    """A row of metrics as scalars by name: `train/loss`, `eval/frechet/1-step`, `speed/images_per_s`, `hours/gpu`."""
    out = {f"{kind}/{key}": float(v) for key, v in values.items() if _number(v)}
    for k, figures in (values.get("steps") or {}).items() if kind == "eval" else ():
        name = f"{k}-step{'s' * (int(k) > 1)}"
        out |= {f"eval/{figure}/{name}": float(v) for figure, v in figures.items() if _number(v)}
    if _number(wall.get("images_per_s")):
        out["speed/images_per_s"] = float(wall["images_per_s"])
    if "train_s" in wall:
        out["hours/wall"] = (wall["train_s"] + wall.get("eval_s", 0.0)) / 3600
    for unit, phases in (wall.get("bill") or {}).get("amounts", {}).items():
        out[f"hours/{unit}"] = sum(amount["seconds"] for amount in phases.values()) / 3600
    return out


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def known_id(folder: Path, name: str) -> str | None:
    """The id under which a logger knows a stage, None where it does not yet."""
    with contextlib.suppress(OSError, ValueError):
        found = sound.read(folder / IDS).get(name)
        return found if isinstance(found, str) else None
    return None


def keep_id(folder: Path, name: str, value: str) -> None:
    """Write it down, for a process that goes on with the stage."""
    try:
        ids = sound.read(folder / IDS)
    except (OSError, ValueError):
        ids = {}
    files.write_text(folder / IDS, sound.signed({**ids, "stage": folder.name, name: value}) + "\n")


Job = tuple[Callable[[Logger], None], int]  # what is done with a logger, and the images up to which it is


class Loggers:
    """The loggers of one stage. Every call returns at once; what fails is one line on stderr and ends that logger alone."""

    def __init__(self, names: Sequence[str], about: Opening, rows: Rows = lambda: ()) -> None:
        """rows: of metrics.jsonl up to the checkpoint; a logger to which the stage is new gets them first."""
        self.about, self.last_nimg = about, about.nimg
        self.workers = [w for name in names if (w := _Worker.opened(name, about))]
        for worker in self.workers:
            if worker.logger.fresh:
                self._catch_up(worker, rows)

    def row(self, kind: str, nimg: int, values: dict[str, Any], wall: dict[str, Any]) -> None:
        """A row of metrics, as `Log.row` takes it."""
        self.last_nimg = nimg
        for worker in self.workers:
            self._send(worker, kind, nimg, values, wall, time.time())

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """A picture that is on disk."""
        for worker in self.workers:
            self._show(worker, name, nimg, path, time.time())

    def close(self) -> None:
        """Wait for what is still to be sent, DRAIN_S at most."""
        for worker in self.workers:
            worker.close(whole=self.last_nimg >= self.about.total_nimg)
        self.workers = []

    def _send(self, worker: _Worker, kind: str, nimg: int, values: dict, wall: dict, when: float) -> None:
        at, found = self.about.before_nimg + nimg, flat(kind, values, wall)
        if found:
            worker.put(lambda logger: logger.scalars(at, found, when), nimg)

    def _catch_up(self, worker: _Worker, rows: Rows) -> None:
        """What is on disk already: rows, then pictures of steps that are on the record. One by one, in the worker's thread."""
        grids = sorted((self.about.folder / "grids").glob("[0-9]*.png"))

        def send(logger: Logger) -> None:
            nimg_of: dict[int, int | None] = {int(path.stem): None for path in grids}
            for row in rows():
                if row["step"] in nimg_of:
                    nimg_of[row["step"]] = row["nimg"]
                rest = {k: v for k, v in row.items() if k not in ("kind", "step", "nimg", "wall")}
                when = (row["wall"].get("bill") or {}).get("until") or time.time()
                if found := flat(row["kind"], rest, row["wall"]):
                    logger.scalars(self.about.before_nimg + row["nimg"], found, when)
            for path in grids:
                nimg = nimg_of[int(path.stem)]
                if nimg is not None:
                    logger.picture(*self._picture("samples", nimg, path), path.stat().st_mtime)

        worker.put(send, self.about.nimg)

    def _show(self, worker: _Worker, name: str, nimg: int, path: Path, when: float) -> None:
        shown = self._picture(name, nimg, path)
        worker.put(lambda logger: logger.picture(*shown, when), nimg)

    def _picture(self, name: str, nimg: int, path: Path) -> tuple[int, str, Path, str]:
        """What a logger is told of a picture."""
        caption = (
            f"{self.about.stage} at {nimg:,} images; each column one noise and one class, each row a number of steps"
        )
        return self.about.before_nimg + nimg, name, path, caption


class _Worker:
    """One logger and the thread that it works in, so that a slow network or disk costs no step.

    sent: the last jobs that it took, some of which may have come to nothing when a full disk is noticed, each with the images
    up to which it is; late: those that wait for room.
    """

    def __init__(self, name: str, logger: Logger, reopen: Callable[[int | None], Logger] | None = None) -> None:
        """reopen: makes it anew for what comes after so many images, or after what it had as the stage began."""
        self.name, self.logger, self.failed, self.reopen = name, logger, False, reopen
        self.sent, self.late, self.broken, self.tried = list[Job](), list[Job](), False, 0.0
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    @classmethod
    def opened(cls, name: str, about: Opening) -> _Worker | None:
        """None, and a line, where it cannot be opened: a run that was started again at night goes on without it."""
        try:
            module = importlib.import_module(f"cmt_fast.storage.loggers.to_{name}")
            again = lambda nimg: module.open_logger(
                about if nimg is None else about._replace(nimg=nimg, seen_nimg=nimg)
            )
            return cls(name, module.open_logger(about), again)
        except Exception as error:
            _told(name, about.stage, error)
            return None

    def put(self, job: Callable[[Logger], None], nimg: int = 0) -> None:
        """nimg: of the stage, up to which all is logged when the job is done."""
        if not self.failed:
            self.jobs.put((job, nimg))

    def close(self, whole: bool) -> None:
        self.put(lambda logger: logger.close(whole))
        self.jobs.put(None)
        self.thread.join(DRAIN_S)
        if self.thread.is_alive():
            print(f"cmt: {self.name}: is not done after {DRAIN_S:.0f} s; its last rows may be missing", file=sys.stderr)

    def _work(self) -> None:
        while job := self.jobs.get():
            if self.failed:
                continue
            self.late.append(job)
            if not self.broken or time.monotonic() - self.tried > AGAIN_S:
                self._deliver()
        if self.broken and not self.failed:
            self._deliver()
        if self.late and not self.failed:
            count = f"{len(self.late):,} of its last rows and pictures"
            print(f"cmt: {self.name}: {count} found no room; metrics.jsonl has them", file=sys.stderr, flush=True)

    def _deliver(self) -> None:
        """What waits, in order, as far as there is room."""
        self.tried = time.monotonic()
        try:
            if self.broken and self.reopen:
                since = self.sent[0][1] if self.sent else None
                self.logger, self.late = self.reopen(since), self.sent[1:] + self.late
                self.sent, self.broken = self.sent[:1], False
            while self.late:
                self.late[0][0](self.logger)
                self.sent = [*self.sent, self.late.pop(0)][-SURE:]
        except Exception as error:
            full = files.is_full(error) and self.reopen is not None
            if full and not self.broken:
                text = f"{os.strerror(errno.ENOSPC)}; what it is to get waits in memory until there is room"
                print(f"cmt: {self.name}: {text}", file=sys.stderr, flush=True)
            self.broken, self.failed = full, not full
            if not full:
                _told(self.name, "", error)
            with contextlib.suppress(Exception):
                self.logger.close(False)


def _told(name: str, stage: str, error: Exception) -> None:
    """The one line of a logger that failed."""
    text = one_line(hidden(str(error))) or type(error).__name__
    where = f" of {stage}" if stage else " from here on"
    line = f"cmt: {name}: {text[:600]}; it gets nothing{where}, metrics.jsonl has every row"
    print(line, file=sys.stderr, flush=True)


def environment(name: str) -> str | None:
    """A variable of the surroundings, None where it is empty."""
    return os.environ.get(name) or None
