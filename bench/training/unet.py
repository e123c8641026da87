"""Training steps of an EDM2 in the ImageNet-512 recipe, timed, and on a GPU told apart by kernel.

The step is the trainer's: the loss of rows or of points of trajectories, backward, optimizer, constraints. A row each for the
kernels of this machine and for plain torch between the convolutions, eager, in turns. On a GPU, or with `--profile`, torch's
profiler adds what every kernel took in one step, largest first, beside what `python -m bench launches` predicts of that step.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import table, use
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.harness.results_file import Results
from bench.harness.timing import Deadline, quantiles
from bench.harness.worker import out_of_memory
from bench.training import unets
from bench.training.contender import free, timed
from bench.training.unet_launches import PLAIN
from cmt_fast.engine import LocalEngine
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.runtime import machine

WAYS = {"kernels": "", "torch between convolutions": ",".join(f"{op}:reference" for op in PLAIN)}
KERNELS = 40  # of a profile that are kept, the longest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="EDM2-S", help="EDM2-XS to EDM2-XXL")
    parser.add_argument("--batch", type=int, help="rows of a step; halved until they fit; default 128, from M on 16")
    parser.add_argument("--objective", action="append", choices=unets.STAGES, help="default: all of them")
    parser.add_argument("--turns", type=int, default=10, help="steps of each way; default 10")
    parser.add_argument("--minutes", type=float, help="of all; fewer turns where they end")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, help="by kernel; default on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a dry run: a tiny network, 2 turns, profiled")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-unet.json")


class Step:
    """One step of an objective on real tensors."""

    def __init__(self, objective: str, m: unets.Unet, device: str) -> None:
        run = unets.run_of(m)
        self.stage = unets.stage_of(run, objective, m)
        self.spec = OBJECTIVES[self.stage.objective.kind]
        with torch.random.fork_rng(devices=[]), torch.device(device):
            net = unets.network(run, m)
            frozen = unets.teacher(run, m) if self.spec.teacher else None
            self.context = unets.context(run, m, objective, frozen)
            if self.context.perceptual is not None:
                self.context.perceptual.net.to(device)
            drawn = unets.rows(m, objective)
        self.rows = type(drawn)(*(x.to(device) if isinstance(x, Tensor) else x for x in drawn))
        self.engine = LocalEngine(net, self.stage, torch.device(device))

    def __call__(self) -> None:
        loss = self.spec.function(self.engine, self.rows, self.stage.objective, self.context)[0].mean()
        self.engine.backward(loss)
        self.engine.step(1e-5)


@contextlib.contextmanager
def way(name: str) -> Any:
    """The kernels of this machine, or plain torch for the ops between convolutions."""
    with use(WAYS[name]) if WAYS[name] else contextlib.nullcontext():
        yield


def fitting(objective: str, m: unets.Unet, device: str) -> tuple[Step, unets.Unet]:
    """A step that was taken once each way, at the batch or a half, ... of it. Raises what the allocator said of one row."""
    while True:
        try:
            step = Step(objective, m, device)
            for name in WAYS:
                with way(name):
                    step()
            return step, m
        except Exception as error:
            if not out_of_memory(error) or m.batch == 1:
                raise
        step = None
        free(device)
        m = m._replace(batch=m.batch // 2)


def by_kernel(step: Callable[[], None], device: str) -> list[dict[str, Any]]:
    """What each kernel of one step took, on a CPU each operator: name, calls, ms, the longest first."""
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        step()
        if gpu:
            torch.cuda.synchronize()
    took = lambda e: e.self_device_time_total if gpu else e.self_cpu_time_total
    found = [{"name": e.key[:160], "calls": e.count, "ms": 1e-3 * took(e)} for e in seen.key_averages() if took(e)]
    return sorted(found, key=lambda row: -row["ms"])[:KERNELS]


def measure(objective: str, m: unets.Unet, arguments: argparse.Namespace, end: Deadline) -> list[dict[str, Any]]:
    """The rows of one objective."""
    device, gpu = arguments.device, arguments.device == "cuda"
    machine.allow_tf32(unets.stage_of(unets.run_of(m), objective, m).precision == "tf32")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    step, m = fitting(objective, m, device)
    ms: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for turn in range(2 if arguments.tiny else arguments.turns):
        if turn > 1 and end.over:
            break
        for name in WAYS:
            with way(name):
                ms[name].append(timed(step, device))
    out = []
    for name, times in ms.items():
        p20, p50, p80 = quantiles([t for t, _ in times])
        base = {
            "objective": objective,
            "model": m.name,
            "batch": m.batch,
            "precision": step.stage.precision,
            "how": name,
        }
        row = base | {
            "turns": len(times),
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "images_per_s": 1e3 * m.batch / p50,
        }
        row |= {"host_ms": quantiles([h for _, h in times])[1] if gpu else None}
        row |= {"peak_gb": torch.cuda.max_memory_allocated() * 1e-9 if gpu else None}
        if arguments.profile if arguments.profile is not None else gpu or arguments.tiny:
            with way(name):
                row["kernels"] = by_kernel(step, device)
        out.append(row)
    machine.allow_tf32(False)
    return out


def run(arguments: argparse.Namespace) -> int:
    """Print the rows, write the JSON; 1 if a step cannot run."""
    try:
        m = unets.unet("dry" if arguments.tiny else arguments.model, arguments.batch)
    except ValueError as error:
        raise SystemExit(f"unet: {error}") from None
    results = Results("unet", arguments.device, arguments.json, tiny=arguments.tiny, ops=table(arguments.device))
    asked, end, status = arguments.objective or list(unets.STAGES), Deadline(arguments.minutes), 0
    results.plan(asked)
    for objective in asked:
        try:
            rows = measure(objective, m, arguments, end)
        except Exception as error:
            if not out_of_memory(error):
                raise
            results.skip(objective, " ".join(str(error).split())[:200])
            status = 1
            continue
        results.add(*rows)
        results.done(objective)
        for row in rows:
            print(
                f"{objective:6} {row['model']} B{row['batch']} {row['precision']} {row['how']:27} {row['p50_ms']:9.2f} ms "
                f"({row['p20_ms']:.2f}-{row['p80_ms']:.2f}) {row['images_per_s']:8.1f} images/s",
                flush=True,
            )
            for kernel in row.get("kernels", [])[:8]:
                print(f"       {kernel['ms']:9.3f} ms {kernel['calls']:5} x {kernel['name'][:100]}")
        free(arguments.device)
    print("written to", results.path)
    return status
