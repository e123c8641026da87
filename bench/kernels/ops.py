"""Times of every op, backend, other library and case, each checked against float64 first: no number for a wrong answer.

On a GPU they are of the kernels alone, from a cold L2 cache; what the host takes to issue a call stands apart (bench.Timer). On a
card whose ceilings are in bench/results/predicted, each row has the least time that they allow and its measured ratio to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import OPS
from cmt_kernels.cases import allowed, backends_on, cases_of, error, implementation, map_tensors, outputs, wide
from torch import Tensor

from bench.harness.results_file import ROOT, Results
from bench.harness.timing import Deadline, interleave, roof, spread
from bench.kernels import libraries

CEILINGS = ROOT / "bench" / "results" / "predicted" / "ops.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help=f"of {', '.join(OPS)}; all of them if absent")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, help="rows per call instead of the 8 of the cases; k scales with it")
    parser.add_argument("--compile", action="store_true", help="time the reference under torch.compile too")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on one case, at least 5 rounds")
    parser.add_argument("--minutes", type=float, help="after which the cases that are left are named")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-ops.json")


def resize(case: Any, batch: int | None) -> Any:
    """The case at another batch size, with the same share of rows that have a tangent."""
    if batch is None or not hasattr(case, "B"):
        return case
    k = getattr(case, "k", None)
    return dataclasses.replace(case, B=batch, **({"k": k * batch // case.B} if k else {}))


class Truth:
    """One set of inputs, drawn on the CPU once, and what the reference makes of it in float64 and in its own dtype."""

    def __init__(self, op: str, case: Any, dtype: torch.dtype, device: str) -> None:
        self.op, self.drawn = op, cases_of(op).inputs(case, dtype, device)
        plain = implementation(op, "reference")
        self.exact, self.yardstick = outputs(op, plain, wide(self.fresh())), outputs(op, plain, self.fresh())

    def fresh(self) -> dict[str, Any]:
        """The inputs, of which nobody has changed anything."""
        return map_tensors(Tensor.clone, self.drawn)


def check(truth: Truth, function: Callable) -> tuple[float | None, str]:
    """Largest error of any output relative to that output's size, and what is wrong: "" if nothing is."""
    exact, yardstick = truth.exact, truth.yardstick
    try:
        got = outputs(truth.op, function, truth.fresh())
    except Exception as failure:
        return None, f"{type(failure).__name__}: {str(failure).split(chr(10))[0]}"
    if [(y.shape, y.dtype) for y in got] != [(y.shape, y.dtype) for y in yardstick]:
        return None, "its shapes or dtypes are not those of the reference"
    errors = [error(y, right) for y, right in zip(got, exact, strict=True)]
    sizes = [right.abs().max().item() if right.numel() else 0.0 for right in exact]
    for i, e in enumerate(errors):
        limit = allowed(yardstick[i], exact[i])
        if not e <= limit:
            return None, f"output {i} errs by {e:.1e}, more than {limit:.1e}"
    return max(e / size if size else e for e, size in zip(errors, sizes)), ""


def ceilings(device: str) -> dict[str, float] | None:
    """gb_s and gflop_s of the card that a device's name speaks of, by which `python -m bench predict` predicts."""
    known = json.loads(CEILINGS.read_text("utf-8"))["ceilings"] if CEILINGS.is_file() else {}
    return next((c for card, c in known.items() if card in device.lower()), None)


def beside_prediction(row: dict[str, Any], known: dict[str, float] | None) -> dict[str, Any]:
    """What the ceilings allow a row at least, bf16 products at their rate, and the time taken over it."""
    if known is None or not row.get("p50_ms"):
        return {"predicted_ms": None, "measured_over_predicted": None}
    least = 1e-6 * max(row["nbytes"] / known["gb_s"], row["flops"] / known["gflop_s"])
    return {"predicted_ms": least, "measured_over_predicted": row["p50_ms"] / least}


def measure(op: str, case: Any, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each backend that can run, times only for those that pass the check."""
    module, device = cases_of(op), arguments.device
    truth = Truth(op, case, dtype, device)
    functions = {name: implementation(op, name) for name in backends_on(op, device)}
    functions |= libraries.of(op, truth.fresh(), device)
    if arguments.compile:
        torch._dynamo.reset()
        functions["compiled"] = torch.compile(implementation(op, "reference"), dynamic=False)
    checks = {name: check(truth, function) for name, function in functions.items()}
    kwargs = {name: truth.fresh() for name, (_, wrong) in checks.items() if not wrong}
    calls = {name: lambda f=functions[name], x=kwargs[name]: f(**x) for name in kwargs}
    times = interleave(calls, device, arguments.seconds)
    shared = {
        "op": op,
        "case": case.id,
        "dtype": str(dtype).removeprefix("torch."),
        "nbytes": module.nbytes(case, dtype.itemsize),
        "flops": module.flops(case),
    }
    return [
        shared | {"backend": name, "error": relative, "wrong": wrong or None} | times.get(name, {})
        for name, (relative, wrong) in checks.items()
    ]


def line(row: dict[str, Any], roofs: dict[str, float]) -> str:
    """One line of the table. Roof: the time the nearer roof allows over the time taken; above 100% where a CPU has the
    data in its cache."""
    label = f"{row['op']:17} {row['case']:40} {row['dtype']:8} {row['backend']:14}"
    if row["wrong"]:
        return f"{label} no time: {row['wrong']}"
    p50 = row["p50_ms"]
    gb_s, gflop_s = row["nbytes"] / p50 * 1e-6, row["flops"] / p50 * 1e-6
    share = max(gb_s / roofs["gb_s"], gflop_s / roofs["gflop_s"])
    return (
        f"{label} {row['p20_ms']:9.4f} {p50:9.4f} {row['p80_ms']:9.4f} {gb_s:8.1f} {gflop_s:9.1f} {share:6.0%} "
        f"{row['error']:9.1e}"
        + (f"  {row['host_ms']:.3f}{'!' if row['host_bound'] else ''}" if "host_ms" in row else "")
        + (f", {row['measured_over_predicted']:.2f}" if row.get("measured_over_predicted") else "")
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a check failed."""
    for op in arguments.op:
        if op not in OPS:
            raise SystemExit(f"ops: {op!r} is not valid; valid are {', '.join(OPS)}")
    chosen = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    dtypes = list(DTYPES.values()) if chosen == "both" else [DTYPES[chosen]]
    results = Results("ops", arguments.device, arguments.json, roof=roof(arguments.device, dtypes[0]))
    known, deadline = ceilings(results["device"]), Deadline(arguments.minutes)
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}")
    print(f"roof: memory {results['roof']['gb_s']:.1f} GB/s, matmul {results['roof']['gflop_s']:.1f} GFLOP/s")
    print(
        f"{'op':17} {'case':40} {'dtype':8} {'backend':14} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} "
        f"{'GB/s':>8} {'GFLOP/s':>9} {'roof':>6} {'error':>9}  host ms, over predicted"
    )
    todo = [
        (op, case, own)
        for op in arguments.op or OPS
        for own in dict.fromkeys(d if d in cases_of(op).DTYPES else torch.float32 for d in dtypes)
        for case in (resize(c, arguments.batch) for c in cases_of(op).BENCH)
    ]
    name = lambda op, case, own: f"{op} {case.id} {str(own).removeprefix('torch.')}"
    results.plan(name(*one) for one in todo)
    for op, case, own in todo:
        if deadline.over:
            break
        for row in measure(op, case, own, arguments):
            row |= beside_prediction(row, known)
            results.add(row)
            print(line(row, results["roof"]), flush=True)
        results.done(name(op, case, own))
    results["spread_median"] = spread(results["rows"])
    if results["spread_median"] is not None:
        print(f"median of the spreads (p80 - p20) / p50: {results['spread_median']:.1%}")
    print("written to", results.path)
    return int(any(row["wrong"] for row in results["rows"]))
