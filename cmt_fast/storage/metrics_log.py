"""Metrics as JSON lines, always; TensorBoard as an extra. What a person sees meanwhile is runtime/progress.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cmt_fast.storage.heartbeat import beat

METRICS = "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Log:
    """One stage's record. Rows: {"kind", "step", "nimg", ..., "wall": {...}}; only "wall" differs between equal runs."""

    def __init__(self, folder: Path, step: int, write: bool, tensorboard: bool = False) -> None:
        """Opens the file for appending after `step`: rows past it belong to work that was lost and is done again.

        write: whether this process keeps it; another takes rows and leaves them.
        """
        self.file, self.run, self.board = None, folder.parent, None
        if write:
            path = folder / METRICS
            kept = [row for row in read(path) if row["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
            os.replace(temporary, path)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            beat(self.run)
            if tensorboard:
                self.board = _tensorboard(folder)

    def row(self, kind: str, step: int, nimg: int, values: dict[str, Any], wall: dict[str, Any] | None = None) -> None:
        """Append one row and flush it to the system."""
        if self.file:
            beat(self.run)
            self.file.write(json.dumps({"kind": kind, "step": step, "nimg": nimg, **values, "wall": wall or {}}) + "\n")
            self.file.flush()
        if self.board:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{key}", value, nimg)

    def commit(self) -> None:
        """Force rows to disk, before a checkpoint that vouches for them."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: is true, but the package is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))
