"""A run on a disk that is too small, at many sizes, and on file systems that refuse calls: what is left, and how it goes on.

A stage of digits with a tiny network, on which `refusing.c` puts a quota, or a refusal, below the run's folder. The quota is
of bytes, at equal steps up to what the undisturbed run holds at most; every other one is of a file system that does not say how
much is free. Each run ends by DiskFull or by ENOSPC of a small file, or trains on where only its record could not be written;
then, with room, it must go on to the bits of the undisturbed one. Every fourth waits, is given room while it does, and must not
end. 200 sizes and all refusals take 3 CPU minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.results_file import ROOT, Results
from bench.safety.refused import TAKERS, leases, refusals
from bench.safety.small_disk import INSIDE, STAGE, Disk, compiled, state, trained

NAME = "diskfull"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=200, help="sizes of the disk (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of where between two steps a size is")
    parser.add_argument("--errors", type=int, default=4, help="error numbers of each refused call (default: 4, all)")
    parser.add_argument("--json", type=Path, default=ROOT / f"bench/results/cpu/{NAME}.json", help="where to write")


def run(arguments: argparse.Namespace) -> int:
    """Compile the library and start over with it; 1 where a line does not hold."""
    if os.environ.get(INSIDE):
        return inside(arguments)
    with tempfile.TemporaryDirectory() as place:
        library = compiled(Path(place))
        env = {**os.environ, "LD_PRELOAD": str(library), INSIDE: str(library), "OMP_NUM_THREADS": "1", "TMPDIR": place}
        return subprocess.run([sys.executable, "-m", "bench", *sys.argv[1:]], env=env, check=False).returncode


def faults_of(folder: Path, ended: BaseException | None) -> list[str]:
    """What a run on a full disk did wrong, as it ended."""
    from cmt_fast.storage import checkpoint, files

    found = []
    if ended is not None and not files.is_full(ended):
        found.append(f"ended by {type(ended).__name__}: {ended}")
    if isinstance(ended, files.DiskFull) and not ended.free < ended.needed:
        found.append(f"needs {ended.needed}, has {ended.free}")
    for step in checkpoint.steps(folder / STAGE):
        try:
            checkpoint.verify(checkpoint.folder_of(folder / STAGE, step))
        except checkpoint.CheckpointError as error:
            found.append(str(error))
    left = [str(p.relative_to(folder)) for p in folder.rglob(".tmp-*")]
    return found + [f"left {name}" for name in left]


def full(disk: Disk, place: Path, arguments: argparse.Namespace, base: dict, most: int) -> dict[str, Any]:
    """The disk full at each of so many sizes."""
    import random

    from cmt_fast.storage import files
    from cmt_fast.train import saving

    dice, row = random.Random(arguments.seed), {"case": "sizes", "n": arguments.n, "most_bytes": most, "faults": []}
    ended = {"full": 0, "small_file": 0, "done": 0, "waited": 0}
    for i in range(arguments.n):
        size, folder = int(most * (i + dice.random()) / arguments.n), place / f"full-{i}"
        disk.at(folder)
        disk.quota(size, honest=i % 2 == 0)
        given: list[int] = []
        if i % 4 == 3:
            with saving.patience("60"), _given(given, lambda: disk.quota(None)):
                error = trained(folder)
            if given and error is not None:
                row["faults"].append(f"{size}: waited, was given room, and ended by {error}")
        else:
            error = trained(folder)
        row["faults"] += [f"{size} bytes: {fault}" for fault in faults_of(folder, error)]
        kind = "waited" if given and error is None else "done" if error is None else "small_file"
        ended["full" if isinstance(error, files.DiskFull) else kind] += 1
        disk.quota(None)
        again = trained(folder)
        if again is not None or state(folder) != base:
            row["faults"].append(f"{size} bytes: with room again it ends otherwise ({again})")
        shutil.rmtree(folder)
    return {**row, "ended": ended}


@contextlib.contextmanager
def _given(given: list[int], room: Callable[[], None]):
    """Inside, a save that waits is given room at its second look."""
    from cmt_fast.train import saving

    real = saving.Saver._pause

    def pause(saver: Any, end: float) -> None:
        given.append(1)
        if len(given) > 1:
            room()

    saving.Saver._pause = pause  # type: ignore[method-assign]
    try:
        yield
    finally:
        saving.Saver._pause = real  # type: ignore[method-assign]


def inside(arguments: argparse.Namespace) -> int:
    """The bench, where the library is preloaded."""
    import torch

    torch.set_num_threads(1)
    disk, rows, said = Disk(), [], io.StringIO()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        disk.at(place / "base")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ended = trained(place / "base")
            assert ended is None, ended
            base, most = state(place / "base"), disk.most()
            rows.append(full(disk, place, arguments, base, most))
            rows += refusals(disk, place, arguments, base)
            rows.append(leases(disk, place))
    if "does not fit" not in said.getvalue() and rows[0]["ended"]["waited"]:
        rows[0]["faults"].append("nothing was said of the room that it waits for")
    results = Results(NAME, "cpu", arguments.json, n=arguments.n, seed=arguments.seed)
    results.add(*rows)
    for key, found in summed(rows).items():
        results[key] = found
    results["cpu_s"] = round(time.process_time(), 1)
    return _told(rows)


def summed(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For a table of promises: of the sizes, of all refusals together, of leases."""
    sizes, *refused, leases_ = rows
    count = lambda found: sum(len(row["faults"]) for row in found)
    return {
        "sizes": {**sizes["ended"], "n": sizes["n"], "most_bytes": sizes["most_bytes"], "faults": count([sizes])},
        "refused": {
            "kinds": len(refused), "errors": sum(len(row["errors"]) for row in refused),
            "calls": sum(row["calls"] for row in refused), "faults": count(refused),
        },
        "leases": {"faults": count([leases_]), "takers": TAKERS},
    }  # fmt: skip


def _told(rows: list[dict[str, Any]]) -> int:
    for row in rows:
        more = {k: v for k, v in row.items() if k not in ("case", "faults")}
        print(f"{row['case']:20} {len(row['faults'])} faults  {json.dumps(more)}", flush=True)
        for fault in row["faults"][:20]:
            print(f"  {fault}")
    return int(any(row["faults"] for row in rows))
