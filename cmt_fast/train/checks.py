"""Checksums of single steps, for `cmt replay`: at every row of metrics the loss, the gradient and the parameters after it.

    STAGE/checks.jsonl   {"step", "processes", "loss", "gradient", "parameters", "xxh3"}, one a line, only ever appended to

A step that is taken again after a kill has a second line: where the two differ, the run is not what it was. One that is taken
again by other settings (`--change`) or with other noise (a rollback) is another step: its line has a "history". The checksums are
made on the device (engine/sums.py), so a line costs two passes over what a step has at hand.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from cmt_fast.engine import sums
from cmt_fast.storage import sound

CHECKS = "checks.jsonl"
KEYS = ("loss", "gradient", "parameters")


class Record:
    """The checksums of a stage's steps. write: whether this process keeps them."""

    def __init__(self, folder: Path, write: bool) -> None:
        self.path, self.write = folder / CHECKS, write

    def add(self, step: int, loss: float, of: Mapping[str, int], processes: int, history: str = "") -> None:
        """A line after `step` steps. A disk that refuses costs the line: training does not end for it."""
        if not self.write:
            return
        line = {"step": step, "processes": processes, **({"history": history} if history else {})}
        line |= {"loss": loss.hex()} | {k: sums.text(v) for k, v in of.items()}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with contextlib.suppress(OSError, sound.Unsound), open(sound.handle(self.path, flags), "wb") as file:
            file.write(_signed(line))


def history(changes: Iterable[Mapping[str, Any]], rollbacks: Iterable[Mapping[str, int]], step: int) -> str:
    """What tells step `step`, from 1, from the same one by other settings or with other noise; empty where there were none.

    changes: of the stage, as run/changes.py has them; rollbacks: as train/nonfinite.py has them.
    """
    known = [*(c for c in changes if "nimg" in c and c["step"] < step), *(r for r in rollbacks if r["from"] < step)]
    return xxhash.xxh3_64_hexdigest(json.dumps(known, sort_keys=True).encode()) if known else ""


def read(folder: Path, step: int, history: str = "") -> list[dict[str, Any]]:
    """The lines of a step of this history, oldest first; those that are not what was written are left out. Raises Unsound where
    there is something else than a file."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(sound.handle(folder / CHECKS), "rb") as file:
        for raw in file:
            line = _parsed(raw)
            if line and line.get("step") == step and line.get("history", "") == history and _signed(line) == raw:
                found.append(line)
    return found


def _parsed(raw: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(raw)
        return line if isinstance(line, dict) else None
    return None


def _signed(line: Mapping[str, Any]) -> bytes:
    body = json.dumps({k: v for k, v in line.items() if k != "xxh3"}, separators=(",", ":"))
    return f'{body[:-1]},"xxh3":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}\n'.encode()
