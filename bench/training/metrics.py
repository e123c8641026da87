"""`python -m bench metrics`: what a long metrics.jsonl costs who writes and who reads it, in CPU seconds and peak memory.

A stage of `--rows` rows of metrics, as GPUs with known energy give them, and 100 evaluations between them. Each reader is a
process of its own: the page of `cmt report --no-judge`, the start of a stage that goes on from a checkpoint 1,000 rows
before the end, the first look of `cmt watch` and one after 10 more rows, and `cmt runs ls`. CPU time and not wall time, so
that a busy machine says the same. `--before TREE` measures another working tree of this repository beside this one, by the
same calls, on a file that its own code wrote; without it what was measured of that before is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGE, BATCH, LOST, EVALUATIONS = "mid", 2048, 1000, 100
PHASES = ("startup", "train", "teacher", "evaluation", "checkpoint", "stalled")
KINDS = ("write", "report", "start", "watch", "runs")
ROOT = Path(__file__).parents[2]
FILE = Path("bench/results/cpu/metrics.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--before", type=Path, metavar="TREE", help="a working tree of an earlier commit")
    parser.add_argument("--json", type=Path, default=FILE)


def run(args: argparse.Namespace) -> int:
    """Measure every reader in this tree and in the other, print the rows, write the JSON."""
    from bench.harness.results_file import Results  # with torch, which the readers are measured without

    kept = json.loads(args.json.read_text("utf-8")) if args.json.is_file() and args.before is None else {}
    results = Results("metrics", "cpu", args.json, metric_rows=args.rows)
    if kept.get("metric_rows") == args.rows:
        results.add(*(row for row in kept["rows"] if row["tree"] == "before"))
    for name, tree in {"before": args.before, "after": ROOT}.items():
        if tree is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for kind in KINDS:
                found = child(kind, tree.resolve(), Path(folder) / "run", args.rows)
                commit = subprocess.run(
                    ["git", "-C", tree, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
                )
                results.add({"tree": name, "commit": commit.stdout.strip(), "what": kind, **found})
                print(json.dumps(results["rows"][-1]), flush=True)
    return 0


def child(kind: str, tree: Path, folder: Path, rows: int) -> dict[str, Any]:
    """One reader in a process of its own that imports from `tree`."""
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    command = [sys.executable, str(Path(__file__).resolve()), kind, str(folder), str(rows)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        raise RuntimeError(f"{kind} in {tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------- in a process of the tree that is measured


def row(i: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers of row i and its "wall": loss falls and is noisy, five phases of the bill grow at times, one at each row."""
    noise = (i * 2654435761 % 1_000_003) / 1_000_003
    train_s = 7.3 * i
    seconds = {
        "startup": 812.4, "train": 8 * train_s, "teacher": 30.7 * (i // 50), "evaluation": 911.3 * (i // 5000),
        "checkpoint": 61.7 * (i // 1000), "stalled": 3.3,
    }  # fmt: skip
    amounts = {p: {"seconds": s, "joules": 611.7 * s, "unmeasured_s": 0.0} for p, s in seconds.items()}
    bill = {"amounts": {"gpu": amounts}, "until": 1.8e9 + train_s, "from_nimg": 0, "reason": ""}
    values = {"loss": (1 + noise) / (1 + i) ** 0.3, "mse": noise / 7, "grad_norm": 1 + noise / 3, "lr": 1e-4}
    return values, {"train_s": train_s, "eval_s": 0.1 * train_s, "images_per_s": 2048 * 50 / 7.3, "bill": bill}


def write_rows(folder: Path, after: int, rows: int) -> float:
    """Rows after `after` into the stage's file. Returns the CPU seconds of the log alone."""
    from cmt_fast.storage.metrics_log import Log

    log, spent = Log(folder / STAGE, after, write=True), 0.0
    for i in range(after + 1, after + rows + 1):
        values, wall = row(i)
        begun = time.process_time()
        log.row("train", i, BATCH * i, values, wall)
        if i % max(1, rows // EVALUATIONS) == 0:
            figures = {k: {"frechet": 30.0 / (1 + i) ** 0.1, "accuracy": 0.9} for k in ("1", "2")}
            log.row("eval", i, BATCH * i, {"steps": figures})
        spent += time.process_time() - begun
    log.close()
    return spent


def measured(folder: Path, kind: str, rows: int) -> dict[str, Any]:
    """Do it, and say what it took: CPU seconds without imports, MB at the most, and MB before it began."""
    extra: dict[str, Any] = {}
    call: Callable[[], Any]
    if kind == "write":
        from cmt_fast.config import loading
        from cmt_fast.run.workspace import Workspace

        length = [f"{STAGE}.batch={BATCH}", f"{STAGE}.images_nimg={BATCH * rows * 2}"]
        work = Workspace(loading.load("digits", length), folder)
        with work.lock():
            work.claim([STAGE])
        (folder / STAGE).mkdir(exist_ok=True)
        call = lambda: extra.update(log_s=write_rows(folder, 0, rows))
    elif kind == "report":
        from matplotlib.backends import backend_svg  # noqa: F401  what every report loads

        from cmt_fast.report import page

        call = lambda: page.write(folder, judge=False)
    elif kind == "start":
        from cmt_fast.storage.metrics_log import Log

        call = lambda: Log(folder / STAGE, rows - LOST, write=True).close()
    elif kind == "watch":
        from cmt_fast.cli.watch import _drawn
        from cmt_fast.watch.state import Watched

        watched = Watched(folder)
        call = lambda: _drawn([watched.look()], 120)
    else:
        from cmt_fast.report import runs

        call = lambda: runs.find(folder)
    before, begun = memory_mb(), time.process_time()
    call()
    extra |= {"cpu_s": time.process_time() - begun, "peak_mb": memory_mb(), "before_mb": before}
    if kind == "watch":
        write_rows(folder, rows - LOST, 10)  # the stage's start cut these off
        watched.look()
        write_rows(folder, rows - LOST + 10, 10)
        begun = time.process_time()
        watched.look()
        extra["next_look_s"] = time.process_time() - begun
    if kind == "write":
        extra["bytes_a_row"] = (folder / STAGE / "metrics.jsonl").stat().st_size / rows
    return extra


def memory_mb() -> float:
    """The most that this process held so far, without what held it before it became this program (as ru_maxrss has)."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # its neighbours have names of other packages
    print(json.dumps(measured(Path(sys.argv[2]), sys.argv[1], int(sys.argv[3]))))
