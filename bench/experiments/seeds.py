"""`python -m bench seeds RECIPE`: the whole recipe over several seeds, and the figures that the README prints.

Each seed is a run of its own; the table holds every stage's distances and accuracies, the ratios of the run to its
control, and the seconds. Nothing is chosen: the seeds are those asked for.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
from datetime import date
from pathlib import Path

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.schema import Run
from cmt_fast.report import page
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime.machine import environment
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.train import loop


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--out", type=Path, default=Path("runs/seeds"))
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/RECIPE-seeds.json")


def run(args: argparse.Namespace) -> int:
    """Train, judge, write the JSON."""
    rows = [measure(args.recipe, int(seed), args.out / f"{args.recipe}-{seed}") for seed in args.seeds.split(",")]
    recipe = loading.load(args.recipe)
    about = facts(args.recipe, recipe) | {
        "images": {name: stage.images_nimg for name, stage in recipe.stages.items()},
        "seeds": rows,
    }
    path = args.json or Path("bench/results/cpu") / f"{args.recipe}-seeds.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path)
    return 0


def measure(recipe: str, seed: int, out: Path) -> dict:
    """Train one seed (or take it up where it stopped) and read its figures."""
    work = Workspace(loading.load(recipe, [f"seed={seed}"]), out)
    names = list(work.run.stages)
    loop.train(work, names)
    page.write(out)
    row: dict = {"seed": seed, "extractor": work.judging.judge.name, "stages": {}, "seconds": {}, "curve": {}}
    steps, e = work.run.eval.steps, work.run.eval
    for name in names:
        net = work.network(name)
        row["stages"][name] = work.judging.evaluate(net, steps, e.n)
        if name == "pre":
            row["stages"]["teacher"] = work.judging.evaluate(net, (work.run.sampler.teacher_steps,), e.n, solver=True)
        row["seconds"][name] = checkpoint.complete(out / name).manifest["wall"]
        row["curve"][name] = [
            {"nimg": r["nimg"], **{k: v["frechet"] for k, v in r["steps"].items()}}
            for r in metrics_log.read(out / name / metrics_log.METRICS)
            if r["kind"] == "eval"
        ]
    row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def facts(name: str, recipe: Run) -> dict:
    """What every experiment's file says of its recipe, tree and machine."""
    return {
        "recipe": name,
        "digest": fingerprint.digest(recipe),
        "commit": commit(),
        "date": date.today().isoformat(),
        "environment": environment(),
        "samples": recipe.eval.n,
    }


def commit() -> str:
    """The commit that is checked out, with + when there are changes."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + "+" * bool(dirty)
