"""A run's folder on disk.

RUN/run.json      resolved recipe, its hash, op table, environment
RUN/<stage>/      metrics.jsonl, checkpoints/, snapshots/, grids/
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cmt_fast.config import loading, paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.runtime import progress
from cmt_fast.storage import checkpoint, files, locks, sound

RUN_FILE = "run.json"
KINDS = {
    "run": dict, "rows": dict, "data": dict, "remembered": dict, "environment": dict, "networks": dict, "contents": dict,
    "changes": dict,     "parents": str, "root": str, "roots": list,
}  # fmt: skip
JUDGING = "judging"  # what evaluations have done before they end (unfinished.py)


def about_run(folder: Path) -> dict:
    """run.json of a run. Raises FileNotFoundError where there is none, Unsound where it is not what was written."""
    about = sound.read(folder / RUN_FILE)
    for key, of in KINDS.items():
        if not isinstance(about.get(key), (of, type(None))):
            raise sound.Unsound(folder / RUN_FILE, f"cannot be read ({key} is of type {type(about[key]).__name__})")
    shape, classes = ((about.get("rows") or {}).get(k) for k in ("shape", "classes"))
    if not isinstance(shape, (list, type(None))) or not isinstance(classes, (int, type(None))):
        raise sound.Unsound(folder / RUN_FILE, "cannot be read (rows have neither a shape nor a number of classes)")
    texts = [*(about.get("roots") or ()), *(about.get("networks") or {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise sound.Unsound(folder / RUN_FILE, "cannot be read (what is no text stands for the name of a place)")
    return about


def stored_run(folder: Path) -> Run:
    """The resolved run of a folder. Raises ConfigError naming the folder."""
    file = folder / RUN_FILE
    try:
        return loading.build(about_run(folder)["run"])
    except FileNotFoundError:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"RUN: {str(folder)!r} is no folder") from None
        raise ConfigError(f"RUN: {str(folder)!r} is no run, it has no {RUN_FILE}{meant(folder)}") from None
    except sound.Unsound as error:
        again = "`cmt train` with its recipe and the same --out writes it anew"
        raise ConfigError(f"RUN: {file} {error.why}; {again}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"RUN: {file} cannot be read ({error})") from None


def meant(folder: Path) -> str:
    """The run that a folder which is none belongs to, as a hint: of a stage, or of something else in it."""
    return f"; it is a part of {str(folder.parent)!r}" if is_run(folder.parent) and folder.name else ""


def classes_of(folder: Path) -> int | None:
    """Classes of the network of the run in a folder, None where there is no run, or one that does not say."""
    try:
        return about_run(folder)["rows"]["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_run(folder: Path) -> Run:
    """The stored run, its relative paths as they are from where it was trained, where they still are. Raises ConfigError."""
    run, root = stored_run(folder), about_run(folder).get("root")
    return paths.rebased(run, Path(root), found=True) if root else run


def located(name: str | Path, folder: Path) -> Path:
    """Another run that the run in `folder` names: from where it was trained, of late or before, from here, or beside it, as
    when both were moved.

    From here and beside it many a run may have that name: of what the run itself named it must have the weights that the run
    saw when it began (`seen`). Where it is in none of these places, where it was.
    """
    other = Path(name)
    try:
        about = about_run(folder)
    except (OSError, ValueError):
        about = {}
    roots = [Path(root) for root in (about.get("root"), *about.get("roots", ())) if root]
    there = next((root / other for root in roots if is_run(root / other)), None)
    if there:
        return there
    known = {text: ema for text, ema in (about.get("networks") or {}).items() if Path(text).parent == other}
    near = beside(other, folder)
    if not known or other.is_absolute() and is_run(other):
        return other
    return next(
        (place for place in (other, near) if is_run(place) and _has(place, known)), roots[0] / other if roots else other
    )


def is_run(folder: Path) -> bool:
    """Whether there is one; not where nobody lets us look."""
    return os.path.isfile(folder / RUN_FILE)


def seen(stages: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """RUN/STAGE, as it is named, -> checksum of its weights, of those (name, folder) that are here: how they are known again."""
    out = {}
    for name, stage in stages:
        ema = _ema(stage)
        if ema:
            out[name] = ema
    return out


def _has(other: Path, known: dict[str, str]) -> bool:
    """Whether a run has all of these weights."""
    return all(_ema(other / Path(name).name) == ema for name, ema in known.items())


def _ema(stage: Path) -> str:
    """Checksum of the weights of a stage, by its manifests alone; empty where there are none."""
    with contextlib.suppress(checkpoint.CheckpointError):
        for step in reversed(checkpoint.steps(stage)):
            with contextlib.suppress(checkpoint.CheckpointError):
                return checkpoint.ema_sum(checkpoint.read_manifest(checkpoint.folder_of(stage, step)))
    return ""


def beside(name: str | Path, folder: Path) -> Path:
    """Where another run is, if it was moved together with the one in `folder`."""
    near = folder.absolute().parent / Path(name).name
    return Path(name) if near == folder.absolute() else near


def parents_of(folder: Path) -> Path | None:
    """Where the stages are that a stored run did not train itself."""
    stored_run(folder)
    parents = about_run(folder).get("parents")
    return located(parents, folder) if parents else None


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Inside, no other process trains or prunes the run (storage/locks.py). Raises ConfigError of `key`."""
    with contextlib.ExitStack() as ending:
        try:
            ending.enter_context(locks.holding(folder, tell=progress.say))
        except locks.Taken as taken:
            raise ConfigError(f"{key}: {folder} is in use by {taken.by}") from None
        except OSError as error:
            if files.is_full(error):
                raise
            raise ConfigError(f"{key}: {folder} cannot be written to ({error.strerror})") from None
        with contextlib.suppress(OSError):
            files.restore(folder / RUN_FILE)
        yield


def judged_by(run: Run, evaluation: dict) -> Run:
    """The run with other keys of `eval`. Raises ConfigError for values that are not valid."""
    tree = loading.dump(run)
    return loading.build({**tree, "eval": {**tree["eval"], **evaluation}}) if evaluation else run


def default(run: Run) -> Path:
    """Where a run lives unless `--out` says so: runs/NAME, whatever the name holds."""
    return Path("runs") / re.sub(r"[^\w.-]+", "-", run.name)
