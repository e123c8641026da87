"""`python -m bench tune RECIPE --pre RUN`: what `nfe: auto` chooses, and the mid-trainings that confirm or refute it.

From one finished teacher the same mid-training, seed and student images, with `nfe: auto`, with the recipe's own
solver and with one that is clearly too coarse (order 1, four calls); and with a budget, which is the forwards that the
recipe's own solver takes: there the bound on the gradient's bias chooses solver and images. Of each: the solver's
estimated error, the student's own one-step error against the best limit at hand, its figures, and the seconds of training
(measuring and pilot are counted apart, for `auto`). For digits 300 s of one core in all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from datetime import date
from pathlib import Path

import torch

from cmt_fast.config import fingerprint, loading
from cmt_fast.run.folder import stored_run
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import machine
from cmt_fast.runtime.machine import environment
from cmt_fast.storage import checkpoint
from cmt_fast.teacher import solver_error, solver_record
from cmt_fast.train import loop, solver_choice

COARSE = ("mid.trajectories.order=1", "mid.trajectories.nfe=4")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe")
    p.add_argument("--pre", type=Path, required=True, help="a run whose pre-training is finished; its seed is taken")
    p.add_argument("--out", type=Path, default=Path("runs/tune"))
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/RECIPE-tune.json")


def run(args: argparse.Namespace) -> int:
    """Settle, train, judge, write the JSON."""
    seed = stored_run(args.pre).seed
    recipe = loading.load(args.recipe, [f"seed={seed}"])
    coarse = COARSE if recipe.path == "ve" else ("mid.trajectories.solver=euler", COARSE[1])
    own = resolve(recipe, "mid")
    budget = round(own.config.images_nimg * own.forwards(own.trajectories.solver, own.trajectories.calls))
    auto = "mid.trajectories.nfe=auto"
    by_bound = (auto, f"mid.trajectories.budget_forwards={budget}")
    arms = {"auto": (auto,), "recipe": (), "coarse": coarse, "budget": by_bound}
    works = {
        k: Workspace(loading.load(args.recipe, [f"seed={seed}", *o]), args.out / k, args.pre) for k, o in arms.items()
    }
    start = time.perf_counter()
    works["auto"].claim(["mid"])
    solver_choice.settle(works["auto"], works["auto"].stage("mid"))
    settling_s = time.perf_counter() - start
    kept = solver_record.read(args.out / "auto" / "mid")
    best = min((row for row in kept.rows if row["high"] is not None), key=lambda row: row["high"])
    ends = solver_choice.endpoints(works["auto"], works["auto"].stage("mid"), lambda calls: None)
    chosen = solver_error.Solver(*(best[k] for k in solver_error.Solver._fields))
    limit = ends.limit(chosen, max(best["nfe"], solver_choice.PROBE))[0]
    rows = {name: measure(work, ends, limit) for name, work in works.items()}
    about = {
        "recipe": args.recipe,
        "digest": fingerprint.digest(recipe),
        "seed": seed,
        "commit": machine.commit(),
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "samples": recipe.eval.n,
        "images": recipe.stages["mid"].images_nimg,
        "settling_s": settling_s,
        "settled": kept._asdict(),
        "arms": rows,
    }
    path = args.json or Path("bench/results/cpu") / f"{args.recipe}-tune.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    for name, row in rows.items():
        figures = {k: round(v["frechet"], 3) for k, v in row["figures"].items()}
        errors = f"solver {row['solver_error']:.3g}, student {row['student_error']:.3g}"
        length = f"{row['images']:,} images, {row['forwards']:,} forwards"
        print(f"{name:>8}: {row['solver']}; {length}; {errors}; {figures}; {row['train_s']:.0f} s")
    print(path)
    return 0


def measure(work: Workspace, ends: solver_error.Endpoints, limit: torch.Tensor) -> dict:
    """Train the mid stage (or take it up where it stopped) and read its figures."""
    loop.train(work, ["mid"])
    stage, net = work.run.stages["mid"], work.network("mid")
    images = work.stage("mid").config.images_nimg
    how = solver_record.settled(work.folder / "mid", stage.trajectories)
    setting = solver_error.Solver(
        "dpmpp" if how.solver == "euler" else how.solver, how.order if how.solver != "euler" else 1, how.shift
    )
    return {
        "trajectories": dataclasses.asdict(how),
        "solver": f"{setting.title()} at {how.nfe}",
        "images": images,
        "forwards": round(images * work.stage("mid").forwards(how.solver, how.nfe)),
        "worth": kept.worth if (kept := solver_record.read(work.folder / "mid")) else None,
        "solver_error": solver_record.rows_of([ends.estimate(setting, how.nfe)])[0]["error"],
        "student_error": solver_choice.one_step_error(work, net, ends, limit) ** 0.5,
        "figures": work.judging.evaluate(net, work.run.eval.steps, work.run.eval.n),
        "train_s": checkpoint.complete(work.folder / "mid").manifest["wall"]["train_s"],
    }
