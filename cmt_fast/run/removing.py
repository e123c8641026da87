"""What of a run can go, by what is to be kept of it, and taking it away. Nothing outside the run's folder is touched.

    final     goes: checkpoints but the last, optimizer and raw weights, EMA snapshots, what kills left, of evaluations too.
              stays: EMA weights of the last checkpoints, and with everything small all that sampling, eval, report, export need
    report    goes: those EMA weights too. stays: records, figures, pictures, the report; what there was, by its checksums
    nothing   the folder

A file that is not known to be one of these stays. Nothing is deleted before the checkpoint that stays was read and found whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES
from cmt_fast.run import folder as folder_
from cmt_fast.run.folder import JUDGING
from cmt_fast.storage import checkpoint, files, heartbeat, pruning

DEPTH = 3  # folders in which other runs are looked for
KEEP = ("final", "report", "nothing")


class Plan(NamedTuple):
    """What goes. paths: whole files and folders; pruned: checkpoints that lose files, with those files; said: what is to be
    known of it beforehand, a line each.
    """

    keep: str
    folder: Path
    paths: list[Path]
    pruned: dict[Path, list[Path]]
    said: list[str]

    @property
    def bytes(self) -> int:
        """How much it frees."""
        return sum(map(pruning.size, [*self.paths, *(f for of in self.pruned.values() for f in of)]))


def stays(keep: str, name: str) -> bool:
    """Whether a file of the last checkpoint does."""
    return keep == "final" and name.startswith("ema-")


def check(folder: Path, force: bool = False) -> None:
    """Raises ConfigError for a folder that is no run, a link, or, unless forced, a run that may be alive elsewhere."""
    if folder.is_symlink():
        raise ConfigError(f"RUN: {str(folder)!r} is a link to {folder.resolve()}; name that folder")
    if not folder_.is_run(folder):
        raise ConfigError(f"RUN: {str(folder)!r} is no run, it has no {folder_.RUN_FILE}{folder_.meant(folder)}")
    # of a process on another machine the lock is not seen here, nor is the time by its clock
    age, recent = heartbeat.age(folder, files.clock(folder)), heartbeat.QUIET_S
    if age is not None and age < recent and not force:
        raise ConfigError(
            f"RUN: {folder} gave a sign of life {age:.0f} s ago; a run counts as alive for {recent:.0f} s. If nothing works "
            "on it, on this machine or another, say --force"
        )


def plan(folder: Path, keep: str, force: bool = False) -> Plan:
    """What `keep` takes away of a run. Raises ConfigError where other runs need what goes, unless forced, and for stages none
    of whose checkpoints is whole.
    """
    users = dependents(folder) if keep != "final" else []
    if users and not force:
        raise ConfigError(
            f"--keep: {keep} takes weights that {', '.join(users)} {_use(users)}; keep final, or say --force"
        )
    said = [f"{user} uses its weights" for user in users]
    if keep == "nothing":
        return Plan(keep, folder, [folder], {}, said)
    paths, pruned = [p for p in (folder / JUDGING,) if p.exists()], dict[Path, list[Path]]()
    for name in STAGES:
        stage = folder / name
        if stage.is_symlink() or (stage / "checkpoints").is_symlink():
            said.append(
                f"{stage} is a link out of the run, or holds one in the place of its checkpoints: left as it is"
            )
            continue
        left = [*(stage / "checkpoints").glob(".tmp-*"), *stage.glob("*.damaged*")]
        paths += [p for p in (stage / "snapshots", *left) if os.path.lexists(p)]
        last = _last(stage, keep)
        if last is None:
            continue
        for step in checkpoint.steps(stage):
            path = checkpoint.folder_of(stage, step)
            if path != last.folder:
                paths.append(path)
        if last.folder.is_symlink():
            said.append(f"{last.folder} is a link out of the run: left as it is")
            continue
        gone = pruning.spare(last.folder, lambda name: stays(keep, name))
        if gone:
            pruned[last.folder] = gone
            if not last.manifest.get("done"):
                said.append(f"{name} is unfinished, at {last.manifest['nimg']:,} images: it cannot go on after this")
    if any(p.name == "snapshots" for p in paths):
        said.append("without snapshots `cmt ckpt reconstruct` makes no other EMA")
    return Plan(keep, folder, paths, pruned, said)


def _use(users: list[str]) -> str:
    return "uses" if len(users) == 1 else "use"


def _last(stage: Path, keep: str) -> checkpoint.Checkpoint | None:
    try:
        return checkpoint.latest(stage)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--keep: {keep} keeps the last checkpoint, and {error}") from None


def apply(plan: Plan) -> None:
    """Take it away; killed in the middle, every checkpoint that stands is whole and the same call ends it.

    Raises ConfigError where another process trains the run.
    """
    with folder_.locked(plan.folder, "RUN"):
        for path in plan.pruned:
            pruning.prune(path, lambda name: stays(plan.keep, name))
        for path in plan.paths:
            pruning.remove(path)


def dependents(folder: Path) -> list[str]:
    """Runs beside this one, and in folders beside it, that take a stage, a teacher or a guide from it.

    Of a run below ./runs all that are there are looked at.
    """
    mine, out = folder.resolve(), []
    runs = Path("runs")
    around = runs if runs.resolve() in mine.parents else folder.parent if folder.name not in ("", "..") else mine.parent
    for other in sorted(
        {file.parent for depth in range(DEPTH) for file in around.glob("*/" * depth + f"*/{folder_.RUN_FILE}")}
    ):
        if other.resolve() == mine:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
            about = folder_.about_run(other)
            named = [about.get("parents"), *(str(Path(text).parent) for text in _stages(about["run"]))]
            if any(name and folder_.located(name, other).resolve() == mine for name in named):
                out.append(str(other))
    return out


def _stages(tree: Any) -> Iterator[str]:
    """Every RUN/STAGE that a recipe names."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _stages(value)
    elif isinstance(tree, str) and "/" in tree and Path(tree).name in STAGES:
        yield tree
