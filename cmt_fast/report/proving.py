"""Every file of a run's folder that anything is read from, and whether it is what was written: `cmt ckpt verify`.

Checkpoints and snapshots of the EMA are read whole, rows line by line, the rest by the checksums that they carry. Pages, their
drawings and the heartbeat are not looked at: they are written anew, and nothing is read from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import features, kept, roots
from cmt_fast.render import grids
from cmt_fast.report import figures
from cmt_fast.run import folder as folder_
from cmt_fast.storage import checkpoint, loggers, metrics_log, sound
from cmt_fast.storage.record import Record
from cmt_fast.teacher import solver_record
from cmt_fast.train import checks, nonfinite
from cmt_fast.usage import bills


class Proof(NamedTuple):
    """What was found of one thing. wrong: why it is not to be relied on, empty where it is; said: what a sound one is."""

    path: Path
    wrong: str = ""
    said: str = "sound"


def run(folder: Path) -> Iterator[Proof]:
    """All of a run, one thing after the other. Raises ConfigError where the folder holds no run at all."""
    try:
        folder_.stored_run(folder)
        yield Proof(folder / folder_.RUN_FILE)
    except ConfigError as error:
        if not (folder / folder_.RUN_FILE).exists():
            raise
        yield Proof(folder / folder_.RUN_FILE, str(error).removeprefix("RUN: "))
    for stage in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if stage.name in sound.STAGES or (stage / "checkpoints").is_dir():
            yield from _stage(stage)
    yield from _asked(folder / features.FILE, features.checked)
    yield from _asked(folder / "theory.json", sound.read)
    for file in _listed(folder / kept.FOLDER):
        if file.suffix == ".json":
            yield from _asked(file, kept.checked)
        elif file.name.startswith("root-"):
            yield from _asked(file, roots.checked)
        elif file.suffix == ".safetensors" and not file.with_suffix(".json").exists():
            yield Proof(file, "has lost the .json that says what it is")
        elif file.suffix == ".png":
            yield from _picture(file)


def _stage(stage: Path) -> Iterator[Proof]:
    for track in (stage, *(t for t in _listed(stage / "snapshots") if t.is_dir())):
        yield from _checkpoints(track)
    rows = stage / metrics_log.METRICS
    yield from _asked(rows, _rows)
    for name, call in (
        (bills.FILE, lambda file: bills.checked(file.parent)),
        (bills.ALIVE, _pulse),
        (figures.FIGURES, figures.checked),
        (solver_record.FILE, lambda file: solver_record.read(file.parent)),
        (loggers.IDS, sound.read),
        (checks.CHECKS, _checks),
        (f"{nonfinite.FOLDER}/{nonfinite.ROLLBACKS}", nonfinite.checked),
    ):
        yield from _asked(stage / name, call)
    for file in _listed(stage / nonfinite.FOLDER):
        if file.name.startswith("step-") and file.suffix == ".json":
            yield from _asked(file, nonfinite.dumped)
    for file in (*_listed(stage / "grids"), *_listed(stage)):
        if file.suffix == ".png":
            yield from _picture(file)


def _checkpoints(track: Path) -> Iterator[Proof]:
    try:
        steps, strays = checkpoint.steps(track), checkpoint.strays(track)
    except checkpoint.CheckpointError as error:
        yield Proof(track / "checkpoints", _why(error, track / "checkpoints"))
        return
    for path in strays:
        yield Proof(path, "is not the name of a checkpoint, it was renamed")
    for step in steps:
        folder = checkpoint.folder_of(track, step)
        try:
            found = checkpoint.verify(folder).manifest
            gone = ", ".join(name.removesuffix(".safetensors") for name in found.get("pruned", {}))
            images = f"{found['nimg']} images" if "nimg" in found else f"step {step}"
            yield Proof(folder, said=f"sound, {images}" + f"; {gone} removed by `cmt runs rm`" * bool(gone))
        except (checkpoint.CheckpointError, OSError) as error:
            yield Proof(folder, _why(error, folder))


def _asked(file: Path, call: Callable[[Path], Any]) -> Iterator[Proof]:
    """What reads one file, and says what is wrong with it; nothing of one that is not there."""
    try:
        call(file)
    except FileNotFoundError:
        return
    except (ValueError, OSError) as error:
        yield Proof(file, _why(error, file))
        return
    if file.exists():
        yield Proof(file)


def _rows(file: Path) -> None:
    manifest = _newest(file.parent)  # before the rows: of a run that is alive more of both may come
    with open(sound.handle(file), "rb") as opened:
        tail = metrics_log.tail(opened)
    record, before = Record.of(file), 0
    if record.lost:
        raise sound.Unsound(file, f"has {record.lost} damaged row{'s' * (record.lost > 1)}, left out by who reads it")
    for row in metrics_log.rows(file):
        if row.get("step", before) < before:
            raise sound.Unsound(file, f"has rows in another order than they were written in, at step {row['step']}")
        before = row.get("step", before)
    if missing := metrics_log.lacking(record.whole, manifest):
        raise sound.Unsound(file, missing)
    if tail:
        raise sound.Unsound(file, "ends in half a row, as a kill leaves it")


def _checks(file: Path) -> None:
    manifest = _newest(file.parent)
    checks.checked(file)
    if missing := metrics_log.lacking(file.stat().st_size, manifest, checks.BYTES):
        raise sound.Unsound(file, missing)


def _newest(stage: Path) -> dict[str, Any] | None:
    """The manifest of a stage's newest sound checkpoint."""
    with contextlib.suppress(checkpoint.CheckpointError):
        for step in reversed(checkpoint.steps(stage)):
            with contextlib.suppress(checkpoint.CheckpointError):
                return checkpoint.sized(checkpoint.folder_of(stage, step)).manifest
    return None


def _pulse(file: Path) -> None:
    if bills.alive(file.parent) is None and file.exists():
        raise sound.Unsound(file, "holds no time")


def _picture(file: Path) -> Iterator[Proof]:
    wrong = grids.wrong(file)
    yield Proof(file, wrong)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _why(error: Exception, path: Path) -> str:
    text = str(error)
    for known in (f"{path}: ", f"{path}/", f"{path} "):
        text = text.removeprefix(known)
    return " ".join(text.split())
