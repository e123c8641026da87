"""Checksums of single steps, for `cmt replay`: at every row of metrics the loss, the gradient and the parameters after it.

    STAGE/checks.jsonl   {"stage", "step", "processes", "layout", "loss", "gradient", "parameters", "xxh3"}, a line each, only
                         ever appended

A step that is taken again after a kill has a second line: where the two differ, the run is not what it was. One that is taken
again by other settings (`--change`) or with other noise (a rollback) is another step: its line has a "history". One that is laid
out otherwise, as over other processes or in smaller parts, has other roundings: only steps of one layout, back to the checkpoint
that they are taken from, are compared. The checksums are made on the device (engine/sums.py), so a line costs two passes over
what a step has at hand.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from cmt_fast.engine import Engine, sums
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.storage import sound
from cmt_fast.storage.metrics_log import tail

CHECKS, BYTES = "checks.jsonl", "checks_bytes"
LAYOUT = "layout"
KEYS = ("loss", "gradient", "parameters")


class Record:
    """The checksums of a stage's steps. write: whether this process keeps them; layout: of its steps."""

    def __init__(self, folder: Path, write: bool, layout: str = "") -> None:
        self.path, self.write, self.layout = folder / CHECKS, write, layout

    def add(self, step: int, loss: float, of: Mapping[str, int], processes: int, history: str = "") -> None:
        """A line after `step` steps. A disk that refuses costs the line: training does not end for it."""
        if not self.write:
            return
        of_step = {"stage": self.path.parent.name, "step": step, "processes": processes, "loss": loss.hex()}
        of_step |= {key: text for key, text in ((LAYOUT, self.layout), ("history", history)) if text}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        with contextlib.suppress(OSError, sound.Unsound), open(sound.handle(self.path, flags), "r+b") as file:
            torn = b"\n" * bool(tail(file))  # what a kill left of a line is one of its own
            file.write(torn + _signed(of_step | {k: sums.text(v) for k, v in of.items()}))

    def stored(self) -> dict[str, Any]:
        """What a manifest keeps: the layout, and the bytes that were there at its save."""
        try:
            return {LAYOUT: self.layout, BYTES: os.stat(self.path, follow_symlinks=False).st_size}
        except OSError:
            return {LAYOUT: self.layout}


def layout(stage: ResolvedStage, engine: Engine) -> str:
    """All of how a step is computed, but for the number of processes, that changes its rounding and may change on the way."""
    kind = f"{stage.run.engine}{f' {engine.level}' if hasattr(engine, 'level') else ''} on {engine.device.type}"
    rolled = f", rollouts of {stage.trajectories.rollout_batch}" if stage.trajectory_rows and not stage.cache else ""
    again = ", activations again" if getattr(stage.run.model, "checkpoint_activations", False) else ""
    return f"{kind}, parts {engine.grad_accum_steps}{rolled}{again}"


def history(changes: Iterable[Mapping[str, Any]], rollbacks: Iterable[Mapping[str, int]], step: int) -> str:
    """What tells step `step`, from 1, from the same one by other settings or with other noise; empty where there were none.

    changes: of the stage, as run/changes.py has them; rollbacks: as train/nonfinite.py has them.
    """
    known = [*(c for c in changes if "nimg" in c and c["step"] < step), *(r for r in rollbacks if r["from"] < step)]
    return xxhash.xxh3_64_hexdigest(json.dumps(known, sort_keys=True).encode()) if known else ""


def lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """What was written, line by line, oldest first; None for a line that is not. Raises FileNotFoundError, Unsound."""
    try:
        opened = sound.handle(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise sound.Unsound(file, f"cannot be read ({error.strerror})") from None
    with open(opened, "rb") as rows:
        for raw in rows:
            yield _parsed(raw, file)


def _parsed(raw: bytes, file: Path) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
        whole = isinstance(line, dict) and _signed(line) == raw
        sound.placed(file, line if whole else {})
    except (ValueError, RecursionError):  # of another stage too
        return None
    return line if whole else None


def read(folder: Path, step: int, history: str = "") -> list[dict[str, Any]]:
    """The lines of a step of this history, oldest first; those that are not what was written, and a file that cannot be read,
    are left out."""
    with contextlib.suppress(OSError, sound.Unsound):
        every = [line for line in lines(folder / CHECKS) if line and line.get("step") == step]
        return [line for line in every if line.get("history", "") == history]
    return []


def alike(folder: Path, start: int, step: int, processes: int, layout: str) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a step to which the run came from step `start` on so many processes by this layout alone, and whether it came
    there so the last time. Lines of a version that did not say their layout are taken for such."""
    out, same = list[dict[str, Any]](), dict[int, bool]()
    with contextlib.suppress(OSError, sound.Unsound):
        for line in lines(folder / CHECKS):
            n = line.get("step", 0) if line else 0
            if line is None or not start < n <= step:
                continue
            before = max((m for m in same if m < n), default=None)
            as_now = line.get("processes") == processes and line.get(LAYOUT, layout) == layout
            same[n] = as_now and (before is None or same[before])
            if n == step and same[n]:
                out.append(line)
    return out, same[max(same)] if same else True


def checked(file: Path) -> None:
    """Raises FileNotFoundError, and Unsound where a line is not what was written."""
    lost = sum(line is None for line in lines(file))
    if lost:
        raise sound.Unsound(file, f"has {lost} damaged line{'s' * (lost > 1)}, left out by who reads it")


def _signed(line: Mapping[str, Any]) -> bytes:
    body = json.dumps({k: v for k, v in line.items() if k != "xxh3"}, separators=(",", ":"))
    return f'{body[:-1]},"xxh3":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}\n'.encode()
