"""Whole training steps of every stage beside the same steps as the published codes take them, eager and compiled.

Ours are the trainer's: rows, pool of trajectories, loss, backward, optimizer, with the cost of a round of trajectories shared
out over its steps. All steps of one objective take turns, and a ratio is taken turn by turn: `peer` (bench/peer.py) over ours,
per image. Mid-training draws as many points from a trajectory as it cost network calls, so that both pay one teacher forward a
row; a row with the recipe's own number of points stands beside it. "Shipped" is the fastest of ours whose precision is safe.

Images a second and a GPU-hour; MFU over a matmul that takes its turn with the steps and, in bf16, over the datasheet's figure;
peak memory; bytes saved for backward; on a GPU the host's time to issue a step. FLOPs are those the algorithm needs once: a
matmul is 2 a multiply-add, backward twice the forward, tangents and no-grad forwards at what they cost, without recomputation.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import table

from bench import about, peer, predict, quantiles, runs, save
from bench.networks import saved_bytes
from cmt_fast import compiled, cost, estimate

DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the SXM cards
DEFAULT = {"cpu": ("digits", "w384d6t64"), "cuda": ("XL256", "XL1024", "L256", "B256", "B1024")}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
RARELY = 4  # of so many turns, one for a round of trajectories and for what is slow and known to lose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--model", action="append", help=f"{', '.join(runs.SMALL)} or SIZE and tokens: XL256; default by device"
    )
    parser.add_argument("--batch", type=int, help="rows of a step; default 64, 16 at 1024 tokens and of w384d6t64")
    parser.add_argument(
        "--objective", choices=runs.OBJECTIVES, action="append", help="default all; on a CPU without ECT and ECD"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="of all; where one objective's share is short, fewer turns and nothing compiled; default 5.5 on a CPU",
    )
    parser.add_argument("--seconds", type=float, help="of one objective's turns, at least 5 of them; default 20 or 5")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time compiled steps too"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run: width 32, one block, 2 turns, MF alone compiled"
    )
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-step.json")


def step_flops(name: str, work: tuple[float, float], teacher: float = 1.0) -> float:
    """FLOPs a student image of a step; work: of one forward, and of attention in it; teacher: its forwards a row."""
    net = cost.Network("", 0, *work)
    return cost.flops_image(estimate.step_work(name, teacher), {"student": net, "teacher": net})


class Contender:
    """One way to take a step: what is called, what a round of trajectories adds to every step, and what was measured."""

    def __init__(self, how: str, precision: str, step: Callable, net: torch.nn.Module, teacher: float = 0.0) -> None:
        self.how, self.precision, self.step, self.net, self.teacher = how, precision, step, net, teacher
        self.pool = getattr(step, "pool", None)
        self.rare = False
        self.ms: dict[int, float] = {}  # by turn
        self.host_ms: list[float] = []
        self.rounds_ms: list[float] = []
        self.peak_gb: float | None = None
        self.saved: int | None = None

    def warm(self, device: str) -> None:
        """First calls, with their memory."""
        if self.pool:
            self.step.fill()
        self.saved = saved_bytes(self.step.loss, self.net)
        self.step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if self.pool:
                self.step.fill()
            self.step()
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
            weights = sum(p.nbytes for p in self.net.parameters())
            held = (4 + len(self.step.stage.ema)) * weights + (weights if self.teacher else 0)
            self.peak_gb = (held + grown) * 1e-9

    def turn(self, i: int, device: str) -> None:
        """Time one step, and now and then a round."""
        if self.rare and i % RARELY:
            return
        if self.pool and i % RARELY == 0:
            self.rounds_ms.append(timed(self.step.fill, device)[0])
        ms, host = timed(self.step, device)
        self.ms[i] = ms + (self.rounds_ms[-1] / self.pool.steps if self.pool else 0.0)
        self.host_ms.append(host)


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """ms of one call, and ms until it returned: on a GPU work is still under way then."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    call()
    host = 1e3 * (time.perf_counter() - start)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), host


def ways(name: str, m: runs.Model, arguments: argparse.Namespace) -> list[tuple[str, str, bool, int | None]]:
    """(how, precision, compiled, points a trajectory) of ours."""
    safe, gpu = runs.OBJECTIVES[name].bf16, arguments.device == "cuda"
    compiles = arguments.compile and (name == "MF" or not arguments.tiny)
    own = runs.config.load(runs.OBJECTIVES[name].recipe).stage(runs.OBJECTIVES[name].stage).trajectories
    out = [("eager", "fp32", False, None)] + [("compiled", "fp32", True, None)] * (compiles and not (gpu and safe))
    if safe:
        out += [("eager", "bf16", False, None)] + [("compiled", "bf16", True, None)] * (compiles and gpu)
    if own and name.startswith("CMT"):
        out += [("eager, recipe's points", "bf16" if gpu else "fp32", False, own.per_trajectory)]
    return out


def contenders(
    name: str, m: runs.Model, arguments: argparse.Namespace, compiling: list[float], share_s: float
) -> Iterator[Contender | dict[str, Any]]:
    """Everything that takes turns, ready to be timed; a dict in place of what cannot run.

    compiling: seconds that compilations have taken so far; one that would take most of `share_s` is left out, and said.
    """
    device = arguments.device
    work = runs.workspace(name, m, device)
    work.network("teacher")
    for precision in ("fp32", "bf16") if device == "cuda" else ("fp32",):
        yield from first_that_fits(name, m, work, precision, device)
    share = None
    for how, precision, compiles, points in ways(name, m, arguments):
        if compiles and max(compiling, default=0.0) > 0.6 * share_s:
            print(f"{name} {m.name}: not compiled, that takes {max(compiling):.0f} s (--minutes)", flush=True)
            continue
        try:
            begun = time.perf_counter()
            stage = runs.stage_of(work, name, m, precision, compiles, points)
            step = runs.Ours(work, name, stage, share)
            share = share or step
            calls = step.pool.teacher_forwards if step.pool else float(name == "ECD")
            one = Contender(how, precision, step, step.engine.net, calls)
            if compiles:
                if step.pool:
                    step.fill()
                compiled.guard(step.engine, step.loss, name)
            one.warm(device)
            if compiles:
                compiling.append(time.perf_counter() - begun)
            one.rare = device == "cpu" and (precision == "bf16" or points is not None)
            yield one
        except (compiled.CompileError, torch.OutOfMemoryError) as error:
            one = step = None
            gc.collect()
            yield {"how": how, "precision": precision, "cannot": " ".join(str(error).split())[:200]}


def first_that_fits(
    name: str, m: runs.Model, work: runs.Bench, precision: str, device: str
) -> Iterator[Contender | dict[str, Any]]:
    """The peer's step at this batch, or at the largest half, quarter, ... of it that the memory allows."""
    rows, why = m.batch, ""
    while rows >= (16 if name.startswith("CMT") else 1):
        stage = runs.stage_of(work, name, m._replace(batch=rows), "fp32", False, None)
        try:
            teaches = name.startswith("CMT") or name == "ECD"
            teacher = peer.plain(work.teacher).requires_grad_(False).eval() if teaches else torch.nn.Identity()
            net, place = peer.plain(work.build()).to(device), torch.device(device)
            data = peer.Rows(work.data.x.to(place), work.data.labels.to(place), work.data.classes)
            one = Contender("peer", precision, peer.Step(stage, net, teacher, data, precision), net, float(teaches))
            one.warm(device)
            yield one
            return
        except torch.OutOfMemoryError as error:
            why, one, net, teacher = str(error), None, None, None
            gc.collect()
            torch.cuda.empty_cache()
            rows //= 2
    yield {"how": "peer", "precision": precision, "cannot": " ".join(why.split())[:200]}


def measure(
    name: str,
    m: runs.Model,
    arguments: argparse.Namespace,
    squares: dict[str, tuple[float, Callable[[], Any]]],
    compiling: list[float],
    share_s: float,
) -> list[dict[str, Any]]:
    """The rows of one objective: all of its contenders, turn by turn, in `share_s` seconds if five turns fit."""
    device, out, there, begun = arguments.device, [], [], time.perf_counter()
    torch._dynamo.reset()
    for one in contenders(name, m, arguments, compiling, share_s):
        (out if isinstance(one, dict) else there).append(one)
    seconds = arguments.seconds if arguments.seconds is not None else 20.0 if device == "cpu" else 5.0
    least, end = (2 if arguments.tiny else 5), min(begun + share_s, time.perf_counter() + seconds)
    square_ms: dict[str, list[float]] = {precision: [] for precision in squares}
    for _, square in squares.values():
        square()
    for i in range(200):
        if i >= least and time.perf_counter() > end:
            break
        for precision, (_, square) in squares.items():
            square_ms[precision].append(timed(square, device)[0])
        for one in there:
            one.turn(i, device)
    roofs = {p: 1e3 * flops / quantiles(square_ms[p])[1] for p, (flops, _) in squares.items()}
    peers = {one.precision: one for one in there if one.how == "peer"}
    work = cost.dit_forward(m.width, m.depth, m.tokens, runs.OBJECTIVES[name].recipe != "digits")
    base = {"objective": name, "model": m.name, "tokens": m.tokens, "width": m.width, "depth": m.depth}
    rows = [base | {"batch": m.batch} | cannot for cannot in out]
    for one in there:
        batch = one.step.stage.batch
        p20, p50, p80 = quantiles(list(one.ms.values()))
        teacher = one.teacher if one.pool else 1.0
        flops = step_flops(name, work, teacher)
        speed = 1e3 * batch / p50
        card = torch.cuda.get_device_name() if device == "cuda" else ""
        known = next((v for name_of, v in DATASHEET.items() if name_of in card), None)
        row = base | {
            "batch": batch, "how": one.how, "precision": one.precision,
            "teacher_forwards": one.teacher if name.startswith("CMT") else None,
            "turns": len(one.ms), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "images_per_s": speed,
            "images_per_gpu_hour" if device == "cuda" else "images_per_core_hour":
                3600 * speed / (1 if device == "cuda" else torch.get_num_threads()),
            "gflop_image": flops * 1e-9, "mfu_measured": flops * speed / roofs[one.precision],
            "matmul_flop_s": roofs[one.precision],
            "mfu_datasheet": flops * speed / known if known and one.precision == "bf16" else None,
            "peak_gb": one.peak_gb, "saved_mb": one.saved * 1e-6,
            "host_ms": quantiles(one.host_ms)[1] if device == "cuda" else None,
            "round_ms": quantiles(one.rounds_ms)[1] if one.rounds_ms else None,
            "over_peer": {p: ratio(q, one) for p, q in peers.items() if one.how != "peer"},
            "predicted_us": predict.step_us(name, m.name, one.how, one.precision),
        }  # fmt: skip
        rows.append(row)
    safe = [r for r in rows if r["how"] in ("eager", "compiled") and "p50_ms" in r]
    if safe:
        min(safe, key=lambda r: r["p50_ms"] / r["batch"])["shipped"] = True
    return rows


def ratio(theirs: Contender, ours: Contender) -> dict[str, float]:
    """Theirs over ours per image, turn by turn: p20, p50, p80."""
    scale = ours.step.stage.batch / theirs.step.stage.batch
    both = sorted(theirs.ms.keys() & ours.ms.keys())
    return dict(zip(("p20", "p50", "p80"), quantiles([scale * theirs.ms[i] / ours.ms[i] for i in both])))


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    label = f"{row['objective']:6} {row['model']:9} B{row['batch']:<3} {row['how']:22} {row['precision']:4}"
    if "cannot" in row:
        return f"{label} no time: {row['cannot']}"
    hour = row.get("images_per_gpu_hour", row.get("images_per_core_hour"))
    some = lambda value, text: format(value, text) if value is not None else "-".rjust(7)
    over = "  ".join(f"{p} {r['p50']:.2f} ({r['p20']:.2f}-{r['p80']:.2f})" for p, r in row["over_peer"].items())
    guess = row["predicted_us"]
    return (
        f"{label} {row['p50_ms']:9.2f} ({row['p20_ms']:.2f}-{row['p80_ms']:.2f}) {row['images_per_s']:9.1f} {hour:11,.0f} "
        f"{some(row['mfu_datasheet'], '7.1%')} {row['mfu_measured']:6.1%} {some(row['peak_gb'], '7.2f')} "
        f"{row['saved_mb']:9.1f} {some(row['host_ms'], '7.2f')}  {over}{'  shipped' if row.get('shipped') else ''}"
        + (f"  PREDICTED {guess:.0f} us an image, measured {1e6 / row['images_per_s']:.0f}" if guess else "")
    )


def matmuls(device: str, tiny: bool) -> dict[str, tuple[float, Callable[[], Any]]]:
    """precision -> FLOPs and call of a square matmul in it, which takes turns with the steps."""
    n = 8192 if device == "cuda" and not tiny else 256 if tiny else 1024
    squares = {name: torch.randn(n, n, device=device).to(dtype) for name, dtype in PRECISIONS.items()}
    return {name: (2.0 * n**3, lambda a=a: a @ a) for name, a in squares.items()}


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a step cannot run."""
    squares = matmuls(arguments.device, arguments.tiny)
    results: dict[str, Any] = about(arguments.device) | {"tiny": arguments.tiny, "ops": table(), "rows": []}
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    per = "GPU" if arguments.device == "cuda" else "core"
    print(
        f"step ms p50 (p20-p80), images/s, images/{per}-hour, MFU datasheet, MFU measured, peak GB, MB saved, host ms, peer/ours"
    )
    names = ["dry"] if arguments.tiny else arguments.model or DEFAULT[arguments.device]
    try:
        models = [runs.model(name, arguments.batch) for name in names]
    except ValueError as error:
        raise SystemExit(f"step: {error}") from None
    objectives = [o for o in runs.OBJECTIVES if o not in ("ECT", "ECD") or arguments.device == "cuda" or arguments.tiny]
    minutes = arguments.minutes or (5.5 if arguments.device == "cpu" else float("inf"))
    todo = [(m, name) for m in models for name in arguments.objective or objectives]
    end, compiling = time.perf_counter() + 60 * minutes, []
    for i, (m, name) in enumerate(todo):
        share_s = (end - time.perf_counter()) / (len(todo) - i)
        for row in measure(name, m, arguments, squares, compiling, share_s):
            results["rows"].append(row)
            print(line(row), flush=True)
        gc.collect()
    kind = f"step-{names[0].lower()}" if arguments.model and len(models) == 1 else "step"
    print("written to", save(kind, arguments.device, results, arguments.json))
    return int(any("cannot" in row for row in results["rows"]))
