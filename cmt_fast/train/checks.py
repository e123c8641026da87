"""Checksums of single steps, for `cmt replay`: at every row of metrics the loss, the gradient and the parameters after it.

    STAGE/checks.jsonl   {"step", "processes", "loss", "gradient", "parameters", "xxh3"}, one a line, only ever appended to

A step that is taken again after a kill has a second line: where the two differ, the run is not what it was. The checksums are
made on the device (engine/sums.py), so a line costs two passes over what a step has at hand.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from cmt_fast.engine import sums
from cmt_fast.storage.metrics_log import parsed

CHECKS = "checks.jsonl"
KEYS = ("loss", "gradient", "parameters")


class Record:
    """The checksums of a stage's steps. write: whether this process keeps them."""

    def __init__(self, folder: Path, write: bool) -> None:
        self.path, self.write = folder / CHECKS, write

    def add(self, step: int, loss: float, of: Mapping[str, int], processes: int) -> None:
        """A line after `step` steps. A disk that refuses costs the line: training does not end for it."""
        if not self.write:
            return
        line = {"step": step, "processes": processes, "loss": loss.hex()} | {k: sums.text(v) for k, v in of.items()}
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            file.write(_signed(line))


def read(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a step, oldest first; those that are not what was written are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(folder / CHECKS, "rb") as file:
        for raw in file:
            line = parsed(raw)
            if line and line.get("step") == step and _signed(line) == raw:
                found.append(line)
    return found


def _signed(line: Mapping[str, Any]) -> bytes:
    body = json.dumps({k: v for k, v in line.items() if k != "xxh3"}, separators=(",", ":"))
    return f'{body[:-1]},"xxh3":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}\n'.encode()
