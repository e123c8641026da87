"""A tiny run of one stage, and the file system of `refusing.c` below its folder, in the process that it is preloaded into."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("refusing.c")
INSIDE = "CMT_REFUSING"  # set in the process that the library is preloaded into
STAGE = "pre"
SETTINGS = [
    "model.width=16", "model.depth=1", "model.heads=2", "eval.n=50", "eval.n_during=50", "pre.batch=32",
    "pre.images_nimg=256", "pre.warmup_nimg=64", "pre.checkpoint_every_nimg=64", "pre.grid_every_nimg=null",
    "pre.eval_every_nimg=null", "pre.ema=[{kind: constant, beta: 0.9}, {kind: power, sigma_rel: 0.1}]",
    "pre.snapshot_every_nimg=128", "device=cpu",
]  # fmt: skip


def compiled(place: Path) -> Path:
    """The library that is preloaded. Raises CalledProcessError, FileNotFoundError without a C compiler."""
    library = place / "refusing.so"
    command = ["cc", "-O1", "-Wall", "-fPIC", "-shared", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


class Disk:
    """The small or refusing file system below a folder."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ[INSIDE])
        self.library.cmt_most.restype = ctypes.c_long

    def at(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.library.cmt_root(os.fsencode(folder))

    def quota(self, count: int | None, honest: bool = True) -> None:
        """Bytes; None: as much as there is."""
        self.library.cmt_honest(int(honest))
        self.library.cmt_quota(ctypes.c_long(-1 if count is None else count))

    def most(self) -> int:
        return int(self.library.cmt_most())

    def refuse(self, call: str, number: int) -> None:
        self.library.cmt_refuse(call.encode(), number)

    def refused(self, call: str) -> int:
        return int(self.library.cmt_refused(call.encode()))


def trained(folder: Path) -> BaseException | None:
    """Train the stage as far as it comes; what ended it, None where it is done."""
    from cmt_fast.config import loading
    from cmt_fast.run.workspace import Workspace
    from cmt_fast.train import loop

    try:
        loop.train(Workspace(loading.load("digits", SETTINGS), folder), [STAGE])
    except BaseException as error:
        return error
    return None


def state(folder: Path) -> dict[str, Any]:
    """What a run ends with: checksums of its newest checkpoint, its snapshots, and its rows without times."""
    from cmt_fast.storage import checkpoint, metrics_log

    stage = folder / STAGE
    sums = lambda of: {
        n: checkpoint.verify(checkpoint.folder_of(of, n)).manifest["files"] for n in checkpoint.steps(of)
    }
    rows = metrics_log.rows(stage / metrics_log.METRICS)
    return {
        "last": checkpoint.complete(stage).manifest["files"],
        "kept": sums(stage),
        "snapshots": sums(stage / "snapshots" / "ema-1"),
        "rows": [{k: v for k, v in row.items() if k != "wall"} for row in rows],
    }
