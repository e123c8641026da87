"""Many steps in one process, with saves, evaluations and pictures: what grows. Memory, files, threads, processes, CUDA events.

A denoiser of points in the plane and its consistency mid-training, a network of a few hundred numbers, so that what a step holds
on to is not hidden behind what it computes: memory between the warm-up, a fifth of the steps, and the end may grow by GROWTH_MB,
and handles by none. The 20,000 steps, 100 saves, 40 evaluations and 20 grids of samples take 75 CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness.results_file import Results
from bench.safety.leaks import default
from cmt_fast.config import loading
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import leftovers, memory
from cmt_fast.train import batches, loop

GROWTH_MB = 5.0
LOOKS = 40  # at what the process holds
HANDLES = ("files", "threads", "children", "groups", "tensors", "events")


def overrides(n: int, batch: int = 8) -> list[str]:
    """n steps in two stages, 50 saves, 20 evaluations and 10 grids each."""
    half = n // 2 * batch
    out = [
        "device=cpu",
        "model.width=16",
        "model.depth=1",
        "data.n=2000",
        "eval.n=200",
        "eval.n_during=100",
        "eval.batch=100",
    ]
    for stage in ("pre", "mid"):
        out += [f"{stage}.batch={batch}", f"{stage}.images_nimg={half}", f"{stage}.warmup_nimg=0"]
        out += [f"{stage}.checkpoint_every_nimg={half // 50}", f"{stage}.eval_every_nimg={half // 20}"]
        out += [f"{stage}.grid_every_nimg={half // 10}"]
    return [*out, "mid.trajectories.pool_steps=4"]


@contextlib.contextmanager
def looking(every: int) -> Iterator[list[leftovers.Handles]]:
    """What the process holds at every so many steps."""
    draw, seen, count = batches.BatchProvider.draw, list[leftovers.Handles](), [0]

    def looked(self: Any, now: int, part: int = 0) -> Any:
        if count[0] % every == 0:
            seen.append(leftovers.Handles.now())
        count[0] += 1
        return draw(self, now, part)

    batches.BatchProvider.draw = looked  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        batches.BatchProvider.draw = draw  # type: ignore[method-assign]


def measured(n: int, folder: Path) -> list[leftovers.Handles]:
    """Train n steps and look LOOKS times."""
    memory.keep_freed()
    work = Workspace(loading.load("gmm", overrides(n)), folder)
    with looking(max(1, n // LOOKS)) as seen, contextlib.redirect_stdout(io.StringIO()):
        loop.train(work, ["pre", "mid"])
    return seen


def grown(seen: list[leftovers.Handles]) -> dict[str, Any]:
    """Megabytes between the warm-up's end and the end, medians of a tenth of the looks; handles that became more.

    Each stage has handles of its own, its teacher's and its saver's, after its first looks, and a save in the background has a
    file while it runs. So the fewest in the halves of each stage are compared: what is never closed is in every later look.
    """
    few, warm, half = max(1, len(seen) // 10), seen[len(seen) // 5 :], len(seen) // 2
    first, last = (statistics.median(x.memory for x in part) / 1e6 for part in (warm[:few], warm[-few:]))
    stages = [part[len(part) // 10 :] for part in (seen[:half], seen[half:])]
    least = lambda part, key: min(getattr(x, key) for x in part)
    fewest = {
        key: [least(part, key) for stage in stages for part in (stage[: len(stage) // 2], stage[len(stage) // 2 :])]
        for key in HANDLES
    }
    return {
        "first_mb": round(first, 2),
        "last_mb": round(last, 2),
        "grown_mb": round(last - first, 2),
        "fewest": fewest,
        "more": [key for key, (a, b, c, d) in fewest.items() if b > a or d > c],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=20_000, help="steps (default: 20,000)")
    parser.add_argument("--seed", type=int, default=0, help="of nothing: the steps are the same each time")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/cpu/soak.json")


def run(arguments: argparse.Namespace) -> int:
    """Print what grew, write the JSON; 1 where memory grew by more than GROWTH_MB, or handles by any."""
    results = Results("soak", "cpu", arguments.json or default("soak"), steps=arguments.n, limit_mb=GROWTH_MB)
    with tempfile.TemporaryDirectory() as name:
        seen = measured(arguments.n, Path(name) / "run")
    found = grown(seen)
    results.add(*[x._asdict() for x in seen])
    for key, value in found.items():
        results[key] = value
    counts = ", ".join(f"{key} {'/'.join(map(str, each))}" for key, each in found["fewest"].items())
    print(
        f"{arguments.n:,} steps: {found['first_mb']:.1f} -> {found['last_mb']:.1f} MB after warm-up ({found['grown_mb']:+.1f})"
    )
    print(f"handles in both halves of pre, of mid: {counts}; more: {', '.join(found['more']) or 'none'}")
    return int(found["grown_mb"] > GROWTH_MB or bool(found["more"]))
