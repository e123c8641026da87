"""`python -m bench seeds RECIPE`: the whole recipe over several seeds, and the figures that the README prints.

Each seed is a run of its own in OUT/RECIPE-SEED; the table holds every stage's distances and accuracies, the ratios of the
run to its control, and the seconds. Nothing is chosen: the seeds are those asked for. Run the same command again to go on:
a run goes on from its checkpoint, and a seed that is measured is read from its `seed.json`. With `--together 2` two seeds
train side by side, each in a process of its own with its share of the threads, and their seconds are those of that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from bench.harness.results_file import write_json
from cmt_fast.config import fingerprint, loading
from cmt_fast.config.schema import Run
from cmt_fast.report import page
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import machine
from cmt_fast.runtime.machine import environment
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.train import loop

ROW = "seed.json"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--out", type=Path, default=Path("runs/seeds"))
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/RECIPE-seeds.json")
    p.add_argument("--together", type=int, default=1, metavar="N", help="seeds side by side, each with threads / N")
    p.add_argument("--rows-alone", action="store_true", help="measure the seeds and write no table")


def run(args: argparse.Namespace) -> int:
    """Train, judge, write the JSON; 1 where a seed failed."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    recipe = loading.load(args.recipe)
    folders = {seed: args.out / f"{recipe.name}-{seed}" for seed in seeds}
    if args.together > 1 and not side_by_side(args, folders):
        return 1
    rows = [measure(args.recipe, seed, folder) for seed, folder in folders.items()]
    if args.rows_alone:
        return 0
    about = facts(recipe.name, recipe) | {
        "images": {name: stage.images_nimg for name, stage in recipe.stages.items()},
        "environment": rows[0]["environment"],
        "seeds": rows,
    }
    path = args.json or Path("bench/results/cpu") / f"{recipe.name}-seeds.json"
    write_json(path, about)
    print(path)
    return 0


def side_by_side(args: argparse.Namespace, folders: dict[int, Path]) -> bool:
    """Measure each seed in a process of its own, `together` at a time; whether all came to their end. Each writes OUT/*.log."""
    threads = str(max(1, (os.cpu_count() or 1) // args.together))

    def one(seed: int) -> bool:
        folders[seed].parent.mkdir(parents=True, exist_ok=True)
        log = folders[seed].with_suffix(".log")
        command = [sys.executable, "-m", "bench", "seeds", args.recipe, "--seeds", str(seed), "--out", str(args.out)]
        with log.open("a") as file:
            code = subprocess.run(
                [*command, "--rows-alone"], env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=file, stderr=file
            ).returncode
        print(f"seed {seed}: {'done' if code == 0 else f'exit code {code}'}, {log}", flush=True)
        return code == 0

    with ThreadPoolExecutor(args.together) as pool:
        return all(list(pool.map(one, folders)))


def measure(recipe: str, seed: int, out: Path) -> dict:
    """Train one seed (or take it up where it stopped) and read its figures; one that stands in its folder is read."""
    work = Workspace(loading.load(recipe, [f"seed={seed}"]), out)
    key, file = fingerprint.digest(work.run), out / ROW
    if file.is_file() and (kept := json.loads(file.read_text("utf-8")))["digest"] == key:
        return kept["row"]
    names = list(work.run.stages)
    loop.train(work, names)
    row = figures(out, seed) | {"environment": environment(), "curve": {}}
    for name in names:
        row["curve"][name] = [
            {"nimg": r["nimg"], **{k: v["frechet"] for k, v in r["steps"].items()}}
            for r in metrics_log.read(out / name / metrics_log.METRICS)
            if r["kind"] == "eval"
        ]
    row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(file, {"digest": key, "row": row})
    return row


def figures(folder: Path, seed: int) -> dict[str, Any]:
    """What the report of a finished run measured, and each stage's seconds by its own clock; the teacher's as `teacher`."""
    report = page.write(folder)
    quality = report["quality"]
    return {
        "seed": seed, "extractor": report["extractor"], "second": report["second"], "floor": report["floor"],
        "stages": {name: judged["few"] for name, judged in quality.items()} | {"teacher": quality["pre"]["solver"]},
        "seconds": {name: checkpoint.complete(folder / name).manifest["wall"] for name in quality},
    }  # fmt: skip


def facts(name: str, recipe: Run) -> dict:
    """What every experiment's file says of its recipe, tree and machine."""
    return {
        "recipe": name,
        "digest": fingerprint.digest(recipe),
        "commit": machine.commit(),
        "date": date.today().isoformat(),
        "environment": environment(),
        "samples": recipe.eval.n,
    }
