"""Whole training steps of every stage beside the same steps as the published codes take them, eager and compiled.

Ours are the trainer's: rows, pool of trajectories, loss, backward, optimizer, with the cost of a round of trajectories shared
out over its steps. On a CPU all steps of one objective take turns, and a ratio is taken turn by turn: `peer` (baseline.py) over
ours, per image; on a GPU each has a process of its own (apart.py). Mid-training draws as many points from a trajectory
as it cost network calls, so that both pay one teacher forward a row; a row with the recipe's own number of points stands beside
it. "Shipped" is the fastest of ours whose precision is safe.

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

from bench.harness.results_file import Results
from bench.harness.timing import Deadline, quantiles
from bench.harness.worker import out_of_memory
from bench.training import apart, predict, runs
from bench.training.contender import PRECISIONS, Contender, free, ours, theirs, timed
from cmt_fast.config import loading
from cmt_fast.cost import estimate
from cmt_fast.cost import flops as flops_
from cmt_fast.engine import compile

DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the SXM cards
DEFAULT = {"cpu": ("digits", "w384d6t64"), "cuda": ("XL256", "XL1024", "L256", "B256", "B1024")}


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
        "--graph", action="store_true", help="replay our steps as CUDA graphs, as `cuda_graph` does; rows of their own"
    )
    parser.add_argument(
        "--stream", action="store_true", help="our bf16 steps with the residual stream in bf16 too; rows of their own"
    )
    parser.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        help="each contender in a process of its own; default on a GPU, whose memory holds no two",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run: width 32, one block, 2 turns, MF alone compiled"
    )
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-step.json")


def step_flops(name: str, work: tuple[float, float], teacher: float = 1.0) -> float:
    """FLOPs a student image of a step; work: of one forward, and of attention in it; teacher: its forwards a row."""
    net = flops_.Network("", 0, *work)
    return flops_.flops_image(estimate.step_work(name, teacher), {"student": net, "teacher": net})


def ways(name: str, m: runs.Model, arguments: argparse.Namespace) -> list[tuple[str, str, bool, int | None]]:
    """(how, precision, compiled, points a trajectory) of ours."""
    safe, gpu = runs.OBJECTIVES[name].bf16, arguments.device == "cuda"
    compiles = arguments.compile and (name == "MF" or not arguments.tiny)
    own = loading.load(runs.OBJECTIVES[name].recipe).stages[runs.OBJECTIVES[name].stage].trajectories
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
        one, why = None, ""
        try:
            one = ours(name, m, work, how, precision, points, share, runs.more(arguments))
            share = share or one.step
            if compiles:
                one.compile(name)
                compiling.append(one.compile_s)
            one.warm(device)
        except Exception as error:
            if not (isinstance(error, compile.CompileError) or out_of_memory(error)):
                raise
            one, why = None, " ".join(str(error).split())[:200]
        free(device)
        if one is None:
            yield {"how": how, "precision": precision, "cannot": why}
            continue
        one.rare = device == "cpu" and (precision == "bf16" or points is not None)
        yield one


def first_that_fits(
    name: str, m: runs.Model, work: runs.Bench, precision: str, device: str
) -> Iterator[Contender | dict[str, Any]]:
    """The peer's step at this batch, or at the largest half, quarter, ... of it that the memory allows."""
    rows, why = m.batch, ""
    while rows >= (16 if name.startswith("CMT") else 1):
        one = None
        try:
            one = theirs(name, m._replace(batch=rows), work, precision)
            one.warm(device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            one, why = None, " ".join(str(error).split())[:200]
        if one:
            yield one
            return
        free(device)  # out of the handler: the exception's frames hold what failed
        rows //= 2
    yield {"how": "peer", "precision": precision, "cannot": why}


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
    peers = {one.precision: one for one in there if one.how == "peer"}
    base = {"objective": name, "model": m.name, "tokens": m.tokens, "width": m.width, "depth": m.depth}
    rows = [base | {"batch": m.batch} | cannot for cannot in out]
    for one in there:
        fitted = {"batch": one.step.stage.batch, "teacher": one.teacher, "peak_gb": one.peak_gb, "saved": one.saved,
                  "compile_s": one.compile_s, "guarded": one.guarded, "more": one.more}  # fmt: skip
        times = {"ms": list(one.ms.values()), "host_ms": one.host_ms, "rounds_ms": one.rounds_ms,
                 "square_ms": roof_ms(one.precision, square_ms)}  # fmt: skip
        row = make_row(name, m, one.how, one.precision, fitted, times, device, squares[one.precision][0])
        rows.append(row | {"over_peer": {p: ratio(q, one) for p, q in peers.items() if one.how != "peer"}})
    ship(rows)
    return rows


def make_row(
    name: str, m: runs.Model, how: str, precision: str, fitted: dict, times: dict, device: str, square: float
) -> dict[str, Any]:
    """The row of one contender. fitted, times: as `contender` gives them; square: FLOPs of the matmul between turns."""
    batch, teacher, mid = fitted["batch"], fitted["teacher"], name.startswith("CMT")
    p20, p50, p80 = quantiles(times["ms"])
    work = flops_.dit_forward(m.width, m.depth, m.tokens, runs.OBJECTIVES[name].recipe != "digits")
    flops, speed = step_flops(name, work, teacher if mid and how != "peer" else 1.0), 1e3 * batch / p50
    rate, gpu = 1e3 * square / quantiles(times["square_ms"])[1], device == "cuda"
    card = torch.cuda.get_device_name() if gpu else ""
    known = next((v for name_of, v in DATASHEET.items() if name_of in card), None)
    guess = predict.step_us(name, m.name, how, precision, card, batch, teacher if mid else 1.0)
    return {
        "objective": name, "model": m.name, "tokens": m.tokens, "width": m.width, "depth": m.depth, "batch": batch,
        "how": ", ".join([how, *fitted["more"]]), "precision": precision, "teacher_forwards": teacher if mid else None,
        "turns": len(times["ms"]), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "images_per_s": speed,
        "images_per_gpu_hour" if gpu else "images_per_core_hour": 3600 * speed / (1 if gpu else torch.get_num_threads()),
        "gflop_image": flops * 1e-9, "mfu_measured": flops * speed / rate, "matmul_flop_s": rate,
        "mfu_datasheet": flops * speed / known if known and precision == "bf16" else None,
        "peak_gb": fitted["peak_gb"], "saved_mb": fitted["saved"] * 1e-6, "compile_s": fitted["compile_s"],
        "guarded": fitted["guarded"], "too_large": fitted.get("tried", []),
        "host_ms": quantiles(times["host_ms"])[1] if gpu else None,
        "round_ms": quantiles(times["rounds_ms"])[1] if times["rounds_ms"] else None, "over_peer": {},
        "predicted_us": guess, "measured_over_predicted": 1e6 / speed / guess if guess else None,
    }  # fmt: skip


def roof_ms(precision: str, square_ms: dict[str, list[float]]) -> list[float]:
    """Times of the square matmul that bounds a step: in its precision or, if that is faster, in fp32, which a processor
    without a unit for bf16 may compute bf16 by."""
    return min(square_ms[precision], square_ms["fp32"], key=lambda ms: quantiles(ms)[1])


def ship(rows: list[dict[str, Any]]) -> None:
    """Mark the fastest of ours: each objective's, of safe precision."""
    for name in {r["objective"] for r in rows}:
        safe = [r for r in rows if r["objective"] == name and r["how"] in ("eager", "compiled") and "p50_ms" in r]
        if safe:
            min(safe, key=lambda r: r["p50_ms"] / r["batch"])["shipped"] = True


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
        + (f"  compiled in {row['compile_s']:.0f} s" if row["compile_s"] else "")
        + (f"  PREDICTED {guess:.0f} us an image, measured / it {row['measured_over_predicted']:.2f}" if guess else "")
    )


def matmuls(device: str, tiny: bool) -> dict[str, tuple[float, Callable[[], Any]]]:
    """precision -> FLOPs and call of a square matmul in it, which takes turns with the steps."""
    n = 8192 if device == "cuda" and not tiny else 256 if tiny else 1024
    squares = {name: torch.randn(n, n, device=device).to(dtype) for name, dtype in PRECISIONS.items()}
    return {name: (2.0 * n**3, lambda a=a: a @ a) for name, a in squares.items()}


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a step cannot run."""
    device = arguments.device
    names = ["dry"] if arguments.tiny else arguments.model or DEFAULT[device]
    try:
        models = [runs.model(name, arguments.batch) for name in names]
    except ValueError as error:
        raise SystemExit(f"step: {error}") from None
    kind = f"step-{names[0].lower()}" if arguments.model and len(models) == 1 else "step"
    results = Results(kind, device, arguments.json, tiny=arguments.tiny, ops=table())
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    per = "GPU" if device == "cuda" else "core"
    print(
        f"step ms p50 (p20-p80), images/s, images/{per}-hour, MFU datasheet, MFU measured, peak GB, MB saved, host ms, peer/ours"
    )
    objectives = [o for o in runs.OBJECTIVES if o not in ("ECT", "ECD") or device == "cuda" or arguments.tiny]
    chosen = arguments.objective or objectives
    apart = device == "cuda" if arguments.apart is None else arguments.apart
    (in_workers if apart else in_turns)(models, chosen, arguments, results)
    print("written to", results.path)
    return int(any("cannot" in row for row in results["rows"]))


def in_workers(models: list[runs.Model], chosen: list[str], arguments: argparse.Namespace, results: Results) -> None:
    """Every contender in a process of its own."""
    deadline = Deadline(arguments.minutes)

    def row_of(*of: Any) -> dict[str, Any]:
        n = 256 if arguments.tiny else 8192 if arguments.device == "cuda" else 1024
        return make_row(*of, arguments.device, 2.0 * n**3)

    for i, m in enumerate(models):
        share = Deadline(min(deadline.left_s, 1e6) / (len(models) - i) / 60)
        apart.Apart(m, arguments, results, line, row_of).run(chosen, share)
        ship([row for row in results["rows"] if row["model"] == m.name])
    results.write()


def in_turns(models: list[runs.Model], chosen: list[str], arguments: argparse.Namespace, results: Results) -> None:
    """All contenders of an objective in this process, turn by turn."""
    squares = matmuls(arguments.device, arguments.tiny)
    minutes = arguments.minutes or (5.5 if arguments.device == "cpu" else float("inf"))
    todo = [(m, name) for m in models for name in chosen]
    end, compiling = time.perf_counter() + 60 * minutes, []
    for i, (m, name) in enumerate(todo):
        share_s = (end - time.perf_counter()) / (len(todo) - i)
        for row in measure(name, m, arguments, squares, compiling, share_s):
            results.add(row)
            print(line(row), flush=True)
        gc.collect()
