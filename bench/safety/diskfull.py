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
import ctypes
import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.results_file import ROOT, Results

SOURCE = Path(__file__).with_name("refusing.c")
INSIDE = "CMT_REFUSING"  # set in the process that the library is preloaded into
STAGE, NAME = "pre", "diskfull"
TAKERS = 8  # of a stale lease at once
SETTINGS = [
    "model.width=16", "model.depth=1", "model.heads=2", "eval.n=50", "eval.n_during=50", "pre.batch=32",
    "pre.images_nimg=256", "pre.warmup_nimg=64", "pre.checkpoint_every_nimg=64", "pre.grid_every_nimg=null",
    "pre.eval_every_nimg=null", "pre.ema=[{kind: constant, beta: 0.9}, {kind: power, sigma_rel: 0.1}]",
    "pre.snapshot_every_nimg=128", "device=cpu",
]  # fmt: skip
REFUSALS = {
    "flock": (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL),
    "sync": (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES),
    "over": (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ETXTBSY),
    "folder": (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM),
    "link": (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK),
}
TITLES = {
    "flock": "flock", "sync": "fsync of a folder", "over": "rename over a file", "folder": "rename of a folder",
    "link": "hard links",
}  # fmt: skip


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
            saving.set_wait_s("60")
            with _given(given, lambda: disk.quota(None)):
                error = trained(folder)
            saving.set_wait_s("0")
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


def refusals(disk: Disk, place: Path, arguments: argparse.Namespace, base: dict) -> list[dict[str, Any]]:
    """A run on a file system that refuses a call, which is stopped and goes on, and a second process that wants it."""
    from cmt_fast.storage import filesystem

    out = []
    for call, numbers in REFUSALS.items():
        row: dict[str, Any] = {"case": TITLES[call], "errors": [], "calls": 0, "faults": []}
        for number in numbers[: arguments.errors]:
            folder, before = place / f"{call}-{number}", disk.refused(call)
            disk.at(folder)
            disk.refuse(call, number)
            name = errno.errorcode[number]
            found = filesystem.probe(folder)
            if call != "link" and len(filesystem.lacks(found)) != 1:
                row["faults"].append(f"{name}: not seen by the probe ({filesystem.line(folder, found)})")
            with _second(folder, stop=4) as (seen, asked):
                first = trained(folder)
            if not isinstance(first, SystemExit) or not asked:
                row["faults"].append(f"{name}: was to stop, and ended by {first!r}")
            if seen != ["taken"]:
                row["faults"].append(f"{name}: a second process was not refused ({seen})")
            again = trained(folder)
            if again is not None or not _as(state(folder), base):
                row["faults"].append(f"{name}: ends otherwise ({again})")
            left = [p.name for p in folder.rglob(".*") if p.name not in (".lock",)]
            row["faults"] += [f"{name}: left {left}"] if left else []
            disk.refuse(call, 0)
            row["errors"].append(name)
            row["calls"] += disk.refused(call) - before
        out.append(row)
    return out


def _as(found: dict, base: dict) -> bool:
    """But for the checkpoint of the step at which it was stopped, which may be one of those that are kept."""
    return all(found[key] == base[key] for key in ("last", "snapshots", "rows"))


@contextlib.contextmanager
def _second(folder: Path, stop: int):
    """Inside, a run is asked for by another process at step `stop`, and then to stop."""
    from cmt_fast import engine
    from cmt_fast.storage import locks
    from cmt_fast.train import loop

    seen: list[str] = []
    asked: list[int] = []
    real, noted = engine.LocalEngine.step, loop.noted

    def step(local: Any, *given: Any) -> Any:
        if local.step_count + 1 == stop and not seen:
            try:
                with locks.holding(folder):
                    seen.append("had")
            except locks.Taken:
                seen.append("taken")
            asked.append(15)
        return real(local, *given)

    engine.LocalEngine.step = step  # type: ignore[method-assign]
    loop.noted = lambda: contextlib.nullcontext(asked)  # type: ignore[assignment]
    try:
        yield seen, asked
    finally:
        engine.LocalEngine.step, loop.noted = real, noted  # type: ignore[method-assign]


def leases(disk: Disk, place: Path) -> dict[str, Any]:
    """Leases that others left where flock is refused: of a dead process here, of one elsewhere that is quiet, or alive; and
    eight that want a stale one at once."""
    from cmt_fast.storage import locks

    row: dict[str, Any] = {"case": "leases", "faults": []}
    locks.BEAT_S, locks.STALE_S = 0.05, 0.5
    disk.at(folder := place / "lease")
    disk.refuse("flock", errno.ENOLCK)

    def leave(**other: Any) -> None:
        (folder / locks.LEASE).write_text(locks._body({**locks._me(), **other}))

    def has(want: str, what: str) -> None:
        try:
            with locks.holding(folder) as held:
                got = held.kind
        except locks.Taken:
            got = "taken"
        if got != want:
            row["faults"].append(f"{what}: {got}, not {want}")

    leave(pid=1 << 30)
    began = time.monotonic()
    has("lease", "of a dead process of this machine")
    row["dead_here_s"] = round(time.monotonic() - began, 3)
    leave(host="elsewhere", boot="other")
    has("lease", "of a quiet process elsewhere")
    (folder / locks.LEASE).write_bytes(b"")
    has("lease", "a torn one")
    leave(host="elsewhere", boot="other")
    with _beating(folder / locks.LEASE):
        has("taken", "of a live process elsewhere")
    leave(host="elsewhere", boot="other", token="old")
    won: list[str] = []
    go = threading.Event()

    def want() -> None:
        try:
            with locks.holding(folder):
                won.append("had")
                go.wait(5)
        except locks.Taken:
            won.append("taken")

    threads = [threading.Thread(target=want) for _ in range(TAKERS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 5
    while len(won) < TAKERS and time.monotonic() < end:
        time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join()
    if won.count("had") != 1:
        row["faults"].append(f"a stale lease was taken over by {won.count('had')} of {TAKERS} at once")
    held = locks.take(folder)
    leave(host="elsewhere", token="other")
    try:
        locks.check(folder / "pre")
        row["faults"].append("a holder does not see that it lost its lease")
    except OSError:
        pass
    held.close()
    disk.refuse("flock", 0)
    return row


@contextlib.contextmanager
def _beating(lease: Path):
    """Inside, another process's lease shows life."""
    ended = threading.Event()

    def beat() -> None:
        for n in itertools.count(1):
            if ended.wait(0.05):
                return
            with open(lease, "r+b") as file:
                file.write(f"{n:012}".encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
