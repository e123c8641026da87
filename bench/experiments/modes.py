"""`python -m bench modes RECIPE`: mid-training from the teacher's trajectories in paper mode, in a pool and from a cache.

Each seed has one pre-trained network and four students of it, at equal student images. `paper` rolls out batch // nfe
trajectories every step and takes all points of each; `pool-all` takes all points too, of many trajectories shuffled, so
the teacher works as much; `pool` is the recipe as it stands; `cache` trains as `pool` does, from trajectories that were
written to disk before and without a teacher. Quality is the run's own evaluation; seconds are those of training steps,
rollouts in them, without evaluation. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.experiments.seeds import facts
from cmt_fast.cli.trajectories import make
from cmt_fast.config import loading
from cmt_fast.config.schema import Run
from cmt_fast.data.latents import read_index
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop

MODES = ("paper", "pool-all", "pool", "cache")
FIGURES = "figures-modes.json"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument(
        "--pre", default=None, metavar="RUN", help="finished pre-training, {seed} in it; trained where missing"
    )
    p.add_argument("--stages", default="mid", help="in order (default: mid; mid,post takes three times as long)")
    p.add_argument("--out", type=Path, default=Path("runs/modes"))
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/RECIPE-modes.json")


def run(args: argparse.Namespace) -> int:
    """Train, judge, print the table, write the JSON."""
    name = Path(args.recipe).stem
    names, seeds = args.stages.split(","), [int(seed) for seed in args.seeds.split(",")]
    rows = []
    for seed in seeds:
        rows += measure(args.recipe, seed, args.out / f"{name}-{seed}", args.pre, names)
    recipe = loading.load(args.recipe)
    about = facts(name, recipe) | {
        "images": {n: recipe.stages[n].images_nimg for n in names},
        "rows": rows,
        "summary": [summary(rows, mode, n) for n in names for mode in MODES],
    }
    path = args.json or Path("bench/results/cpu") / f"{name}-modes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    for line in table(about["summary"]):
        print(line)
    print(path)
    return 0


def measure(recipe: str, seed: int, out: Path, pre: str | None, names: list[str]) -> list[dict[str, Any]]:
    """The students of one seed, each trained or taken up where it stopped, and judged once."""
    plain = loading.load(recipe, [f"seed={seed}"])
    parents = Path(pre.format(seed=seed)) if pre else out / "pre"
    if not pre:
        loop.train(Workspace(plain, parents), ["pre"])
    rows = []
    for mode in MODES:
        cached = cache(plain, parents, out / "trajectories", names) if mode == "cache" else {}
        work = Workspace(_run(recipe, seed, mode, names, out / "trajectories"), out / mode, parents)
        loop.train(work, names)
        rows += [{"seed": seed, "mode": mode, **cached, **figures(work, name)} for name in names]
    return rows


def _run(recipe: str, seed: int, mode: str, names: list[str], folder: Path) -> Run:
    """The recipe with the trajectories of its stages as a mode has them."""
    change = [f"seed={seed}"]
    for name in names:
        change.append(f"{name}.eval_every_nimg=null")  # judged once, at the end
        if mode == "paper":
            change.append(f"{name}.trajectories.mode=paper")
        if mode == "pool-all":
            t = loading.load(recipe).stages[name].trajectories
            change.append(f"{name}.trajectories.per_trajectory={t.nfe}")
        if mode == "cache":
            change += [f"{name}.teacher=null", f"{name}.trajectories.cache={folder}"]
    return loading.load(recipe, change)


def cache(run: Run, parents: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """Write as many trajectories as the first stage rolls out in a pool; every stage reads them. Seconds and bytes."""
    note = folder.with_name(folder.name + ".json")
    if not folder.is_dir():
        work = Workspace(run, parents)
        stage = work.stage(names[0])
        pool = stage.pool(None, work.data.shape, work.data.classes, torch.device("cpu"))
        n = pool.count * -(-stage.schedule.total // pool.steps)
        start = time.perf_counter()
        index = make(work, names[0], folder, n)
        assert index is not None
        note.write_text(json.dumps({"cache_s": time.perf_counter() - start}))
    index = read_index(folder)
    seconds = json.loads(note.read_text())["cache_s"] if note.is_file() else None
    return {"cache_s": seconds, "cache_trajectories": index.rows, "cache_bytes": index.rows * index.stride}


def figures(work: Workspace, name: str) -> dict[str, Any]:
    """The stage's evaluation and its seconds a student image, kept beside it."""
    found = checkpoint.complete(work.folder / name).manifest
    file, ema = work.folder / name / FIGURES, found["files"]["ema-0.safetensors"]["xxh3_128"]
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("ema") != ema:
        steps = work.judging.evaluate(work.network(name), work.run.eval.steps, work.run.eval.n)
        seconds = found["wall"]["train_s"]
        known = {"stage": name, "ema": ema, "nimg": found["nimg"], "train_s": seconds, "steps": steps}
        known["ms_per_image"] = 1e3 * seconds / found["nimg"]
        file.write_text(json.dumps(known))
    return known


def summary(rows: list[dict[str, Any]], mode: str, name: str) -> dict[str, Any]:
    """Means over seeds, and each of them, of one mode of one stage."""
    own = [r for r in rows if (r["mode"], r["stage"]) == (mode, name)]
    distances = {k: [r["steps"][k]["frechet"] for r in own] for k in own[0]["steps"]}
    ms = [r["ms_per_image"] for r in own]
    return {
        "stage": name,
        "mode": mode,
        "seeds": len(own),
        "frechet": {k: {"mean": statistics.mean(v), "each": v} for k, v in distances.items()},
        "ms_per_image": {"mean": statistics.mean(ms), "each": ms},
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a stage and mode."""
    lines = []
    for row in rows:
        distances = "  ".join(
            f"Fréchet @{k} {v['mean']:.3f} ({', '.join(f'{x:.3f}' for x in v['each'])})"
            for k, v in row["frechet"].items()
        )
        ms = row["ms_per_image"]
        each = ", ".join(f"{x:.2f}" for x in ms["each"])
        lines.append(f"{row['stage']:>5} {row['mode']:6} {distances}  {ms['mean']:.2f} ms an image ({each})")
    return lines
