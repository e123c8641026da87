"""Teacher rollouts: trajectories a second, and what they cost a student image, by how many run at once.

Every way rolls out by the trainer's `Pool` and pays the same teacher forwards a student image: mode `paper` a step's few
trajectories, mode `pool` those of a round, in rollouts of the numbers given; eager, compiled, in bf16, and on a GPU as one CUDA
graph. They take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.results_file import Results
from bench.harness.timing import Deadline, quantiles
from bench.training import runs
from bench.training.contender import timed
from cmt_fast.config import loading
from cmt_fast.engine.compile import compile_network
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.run import resolved
from cmt_fast.teacher.precision import Teacher

DEFAULT = {"cpu": ("digits", "w384d6t64"), "cuda": ("B256", "XL256")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", action="append", help="as of `step`; default by device")
    parser.add_argument("--objective", choices=("CMT-CM", "CMT-MF"), default="CMT-CM", help="path and solver")
    parser.add_argument(
        "--at-once", type=int, action="append", help="trajectories of a rollout; default by powers of 4"
    )
    parser.add_argument("--minutes", type=float, help="of all models, after which those that are left are named")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one model's turns, at least 3 of them")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time a compiled teacher too"
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run: width 32, one block, 2 turns, nothing compiled")
    parser.add_argument(
        "--json", type=Path, help="where to write; default bench/results/<device>/<date>-trajectories.json"
    )


class Compiled:
    """A teacher whose network is compiled, as a stage's is."""

    def __init__(self, net: Any) -> None:
        self.call = compile_network(net)
        if hasattr(net, "raw"):
            self.raw, self.scalings = torch.compile(net.raw, fullgraph=True, dynamic=False), net.scalings

    def __call__(self, *arguments: Any) -> Tensor:
        return self.call(*arguments)


def ways(
    name: str, m: runs.Model, arguments: argparse.Namespace
) -> dict[tuple[str, str, str, int], tuple[Callable, int]]:
    """(mode, how, precision, trajectories at once) -> the call, and the trajectories that it rolls out."""
    work = runs.workspace(name, m, arguments.device)
    stage = runs.stage_of(work, name, m, "fp32", False, None)
    assert OBJECTIVES[stage.objective.kind].draws == "trajectories" and stage.trajectories is not None
    gpu, net, name_of = arguments.device == "cuda", work.network("teacher"), runs.OBJECTIVES[name].stage
    out: dict[tuple[str, str, str, int], tuple[Callable, int]] = {}

    def add(mode: str, how: str, precision: str, at_once: int) -> None:
        config = dataclasses.replace(stage.trajectories, mode=mode, rollout_batch=at_once, precision=precision)
        staged = dataclasses.replace(stage, trajectories=config)
        teacher = Teacher(name_of, staged, lambda _: net, work.path, work.device)
        called = Compiled(teacher.net(precision)) if how == "compiled" else teacher.net(precision)
        own = resolved.resolve(dataclasses.replace(work.run, **{name_of: staged}), name_of)
        how_run = {"computing": teacher.computing(precision), "graph": how == "graph"}
        pool = own.pool(called, work.data.shape, work.data.classes, work.device, **how_run)
        out[mode, how, precision, min(at_once, pool.count)] = (lambda: pool._fill(0)), pool.count

    paper = m.batch // stage.trajectories.nfe
    add("paper", "eager", "fp32", paper)
    whole = paper * m.pool_steps
    sizes = [n for n in arguments.at_once or [n for n in (1, 4, 16, 64, 256) if n < whole] + [whole] if n <= whole]
    for n in sizes:
        add("pool", "eager", "fp32", n)
    largest = max(sizes)
    add("pool", "eager", "bf16", largest)
    if gpu:
        add("paper", "eager", "bf16", paper)
        add("paper", "graph", "bf16", paper)
        add("pool", "graph", "bf16", largest)
    if arguments.compile and not arguments.tiny:
        add("pool", "compiled", "fp32", largest)
        if gpu:
            add("pool", "compiled", "bf16", largest)
    return out


def measure(
    name: str, m: runs.Model, arguments: argparse.Namespace, deadline: Deadline, results: Results
) -> list[dict[str, Any]]:
    """The rows of one model, mode paper's first; ways that the deadline leaves no time for are named."""
    found = ways(name, m, arguments)
    for key, (call, _) in list(found.items()):
        if deadline.over and key[0] != "paper":
            results.skip(f"{m.name} {' '.join(map(str, key))} at once")
            del found[key]
        else:
            call()
    times: dict[tuple, list[float]] = {key: [] for key in found}
    end = time.perf_counter() + min(arguments.seconds, max(0.0, deadline.left_s))
    for i in range(50):
        if (i >= (2 if arguments.tiny else 3) and time.perf_counter() > end) or (i and deadline.over):
            break
        for key, (call, count) in found.items():
            times[key].append(timed(call, arguments.device)[0] / count)
    stage = loading.load(runs.OBJECTIVES[name].recipe).stages[runs.OBJECTIVES[name].stage]
    points = stage.trajectories.nfe
    base = next(t for key, t in times.items() if key[0] == "paper")
    rows = []
    for (mode, how, precision, at_once), each in times.items():
        p20, p50, p80 = quantiles(each)
        r20, r50, r80 = quantiles([a / b for a, b in zip(base, each)])
        rows.append(
            {"model": m.name, "objective": name, "mode": mode, "how": how, "precision": precision, "at_once": at_once,
             "turns": len(each), "trajectories_per_s": 1e3 / p50, "points": points,
             "p20_ms_image": p20 / points, "p50_ms_image": p50 / points, "p80_ms_image": p80 / points,
             "paper_over": {"p20": r20, "p50": r50, "p80": r80}}
        )  # fmt: skip
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON."""
    results = Results("trajectories", arguments.device, arguments.json, tiny=arguments.tiny)
    deadline = Deadline(arguments.minutes)
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    print("trajectories/s, teacher ms a student image p50 (p20-p80) at one forward a row, mode paper's over it")
    names = ["dry"] if arguments.tiny else arguments.model or DEFAULT[arguments.device]
    try:
        models = [runs.model(name) for name in names]
    except ValueError as error:
        raise SystemExit(f"trajectories: {error}") from None
    results.plan(m.name for m in models)
    for m in models:
        if deadline.over:
            break
        torch._dynamo.reset()
        for row in measure(arguments.objective, m, arguments, deadline, results):
            results.add(row)
            r = row["paper_over"]
            print(
                f"{row['model']:9} {row['mode']:5} {row['how']:8} {row['precision']:4} {row['at_once']:4} at once "
                f"{row['trajectories_per_s']:9.2f} {row['p50_ms_image']:9.3f} "
                f"({row['p20_ms_image']:.3f}-{row['p80_ms_image']:.3f})"
                f"   {r['p50']:.2f} ({r['p20']:.2f}-{r['p80']:.2f})",
                flush=True,
            )
        results.done(m.name)
    print("written to", results.path)
    return 0
