"""`cmt tune-teacher`: the solver's endpoint error by step doubling, and the cheapest setting that stays below the student's."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import errors, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run, Trajectories
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.render import templates
from cmt_fast.run import folder as folder_
from cmt_fast.run import workspace
from cmt_fast.runtime import distributed, machine, progress
from cmt_fast.storage import checkpoint, files
from cmt_fast.teacher import solver_error, solver_record
from cmt_fast.train import solver_choice

TRUTH_STEPS = 4096  # of the closed form's own solve: 1e-6 or better, see tests
GOALS = (0.1, 0.03, 0.01, 0.003, 0.001)  # one-step errors for which the closed form's cheapest setting is named


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=tune)
    p.add_argument("recipe", metavar="RECIPE|RUN", help="a run folder, or a recipe whose run is at --out")
    add_overrides(p)
    p.add_argument("--out", type=Path, help="the recipe's run folder, which holds the teacher (default: runs/NAME)")
    p.add_argument("--stage", default="mid", help="the stage whose trajectories are measured (default: mid)")
    p.add_argument("--nfe", help="comma-separated numbers of network calls (default: 4 to 64)")
    p.add_argument("--trajectories", type=int, default=solver_error.COUNT, help=f"default: {solver_error.COUNT}")
    p.add_argument("--epsilon", type=float, help="the student's one-step error, a mean square per dimension")
    p.add_argument(
        "--student", metavar="RUN/STAGE", help="measure that error on this network instead of a short pilot training"
    )
    text = f"solver error allowed, in one-step errors of the student (default: {solver_error.MARGIN})"
    p.add_argument("--margin", type=float, default=solver_error.MARGIN, help=text)
    p.add_argument(
        "--all",
        action="store_true",
        help="measure every number of calls instead of stopping at the first that is good enough",
    )
    p.add_argument("--grids", action="store_true", help="on linear flow, try other time shifts than the recipe's too")
    text = (
        "choose as trajectories.budget_forwards does: by the bound on the gradient's bias, at N forwards for the stage"
    )
    p.add_argument("--budget", type=int, metavar="N", help=text)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the table and the choice")


def tune(args: argparse.Namespace) -> None:
    nfes = _nfes(args.nfe)
    if args.trajectories < 8 or not args.margin > 0 or (args.epsilon is not None and not args.epsilon > 0):
        raise ConfigError("--trajectories: must be at least 8; --margin and --epsilon: above 0")
    if args.budget is not None and not args.budget > 0:
        raise ConfigError(f"--budget: {args.budget} is not valid; it is forwards of student and teacher, above 0")
    if args.epsilon is not None and args.student:
        raise ConfigError("--student: cannot be given with --epsilon; either says how good the student is")
    stored = (Path(args.recipe) / folder_.RUN_FILE).is_file()
    if stored and (args.overrides or args.out):
        raise ConfigError(f"RUN: {args.recipe!r} is a run; overrides and --out are for a recipe")
    run = folder_.read_run(Path(args.recipe)) if stored else loading.load(args.recipe, args.overrides)
    have = [name for name, stage in run.stages.items() if stage.trajectories]
    if args.stage not in have:
        hint = errors.nearest(args.stage, have)
        raise ConfigError(f"--stage: {args.stage!r} has no trajectories here; valid are {', '.join(have)}{hint}")
    if run.data.kind == "gmm" and not stored and not args.out:
        return closed_form(run, args, nfes)
    distributed.start(machine.device(run.device), run.timeout_s)
    folder = Path(args.recipe) if stored else args.out or folder_.default(run)
    work = workspace.Workspace(run, folder, folder_.parents_of(folder) if stored else None)
    student = args.student
    budget = args.budget or work.stage(args.stage).trajectories.budget_forwards
    if student is None and args.epsilon is None and not budget and _finished(work, args.stage):
        student = args.stage  # with a budget pilots say how its error falls
    search = solver_choice.Search(
        args.trajectories, nfes, args.epsilon, student, args.margin, whole=args.all, grids=args.grids, budget=budget
    )
    kept = solver_choice.measure(work, work.stage(args.stage), search=search)
    if distributed.rank():
        return
    head = [*solver_record.HEAD, "from the best limit", "serves"]
    rows = [[*solver_record.cells(r), _number(r["common"]), solver_record.serves(r, kept.limit)] for r in kept.rows]
    title = f"Endpoint error by step doubling, RMS per dimension; {args.stage} of {args.recipe}"
    templates.show(templates.Table(title, head, rows))
    if kept.worth and kept.worth["rule"] == "bias":
        weighed = [[*solver_record.cells(r)[:3], *solver_record.worth_cells(r)] for r in kept.rows]
        title = f"Bound on the gradient's bias at {budget:,} forwards: {kept.worth['weight']:.3g} epsilon + (to)^2"
        templates.show(templates.Table(title, [*solver_record.HEAD[:3], *solver_record.WORTH_HEAD], weighed))
    for line in solver_choice.summary(args.stage, kept):
        progress.say(line)
    length = f" {args.stage}.images_nimg={kept.images}" if kept.images else ""
    progress.say(solver_record.override(args.stage, kept.choice) + length)
    _write(args.json, kept._asdict())


def _finished(work: workspace.Workspace, name: str) -> bool:
    found = checkpoint.newest(work.stage_dir(name))
    return bool(found and found.manifest.get("done"))


def _nfes(text: str | None) -> tuple[int, ...]:
    if text is None:
        return solver_error.NFE
    try:
        nfes = tuple(sorted({int(n) for n in text.split(",")}))
    except ValueError:
        raise ConfigError(f"--nfe: {text!r} is not a list of numbers like 4,8,16") from None
    if nfes[0] < 2:
        raise ConfigError(f"--nfe: {nfes[0]} must be at least 2")
    return nfes


def _number(v: float | None) -> str:
    return "-" if v is None else f"{v:.3g}"


def _write(file: Path | None, figures: dict) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, json.dumps(figures, indent=1))


def closed_form(run: Run, args: argparse.Namespace, nfes: tuple[int, ...]) -> None:
    """The mixture's own denoiser and velocity as the teacher, in float64, and the true error beside the estimate."""
    if args.budget is not None:
        raise ConfigError("--budget: the closed form trains no student whose error could fall; name a RUN")
    if args.student:
        raise ConfigError("--student: the closed form has none; name a RUN to tune a trained teacher")
    figures: dict = {"recipe": run.name, "trajectories": args.trajectories, "paths": {}}
    for name in ("ve", "linear"):
        rows, calls = against_truth(run, name, nfes, args.trajectories, args.grids)
        shown = [[*solver_record.cells(r), _number(r["true"]), f"{r['error'] / r['true']:.2f}"] for r in rows]
        title = (
            f"Endpoint error on the mixture, path {name}, {args.trajectories} trajectories, float64, RMS per dimension"
        )
        templates.show(templates.Table(title, [*solver_record.HEAD, "true", "estimate / true"], shown))
        ratios = [r["error"] / r["true"] for r in rows]
        inside = sum(r["low"] <= r["true"] <= r["high"] for r in rows)
        progress.say(
            f"estimate over truth: {min(ratios):.2f} to {max(ratios):.2f} in {len(rows)} settings; the truth is within"
        )
        progress.say(f"the interval in {inside} of them; {calls:,} network calls without the truth's")
        figures["paths"][name] = {"rows": rows, "calls": calls}
        for goal in (math.sqrt(args.epsilon),) if args.epsilon else GOALS:
            good = [r for r in rows if r["high"] is not None and r["high"] <= args.margin * goal]
            best = min(good, key=lambda r: (r["cost"], r["high"]), default=None)
            choice = {k: best[k] for k in (*solver_error.Solver._fields, "nfe")} if best else None
            said = solver_record.override(args.stage, choice) if choice else "none of these settings"
            progress.say(f"student at {goal:.3g}, solver at most {args.margin * goal:.3g}: {said}")
            figures["paths"][name].setdefault("choices", {})[f"{goal:.3g}"] = choice
    _write(args.json, figures)


def against_truth(run: Run, path: str, nfes: tuple[int, ...], count: int, grids: bool) -> tuple[list[dict], int]:
    """`tuning.rows_of` every setting on a mixture, each with its "true" error; and the network calls of all trajectories."""
    way = ProbabilityPath(path, run.sigma_data)
    how = Trajectories() if path == "ve" else Trajectories(solver="heun", t_max=1.0, t_min=0.0)
    mine = run.mid.trajectories
    how = dataclasses.replace(mine, nfe=16) if mine and run.path == path else how
    x, labels = solver_error.starts(way, how, (2,), 0, run.seed, torch.device("cpu"), count)
    net, x = Exact(run.data, way), x.double()
    candidates = [
        (s, n) for n in nfes for s in solver_error.settings(path, how, grids) if s.solver != "heun" or n % 2 == 0
    ]
    with progress.counting(path, solver_error.calls(candidates), None) as advance:
        ends = solver_error.Endpoints(net, way, x, labels, how, advance)
        estimates = [ends.estimate(setting, nfe) for setting, nfe in candidates]
    true = net.flow_map(x, how.t_max, how.t_min, steps=TRUTH_STEPS)
    rows = [{**r, "true": ends.distance(e, true)} for r, e in zip(solver_record.rows_of(estimates), estimates)]
    return rows, ends.calls * ends.count
