"""What this machine does at its best, and where the kernels of the trainer stand: the first run on a new GPU.

Copy and matmul ceilings, the linears of the DiT, attention of each SDPA backend, the dual attention and norms of every
backend of ours beside torch.compile, and the optimizers. Random data, checked first where the op is ours.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cmt_kernels.cases import backends_on, cases_of, implementation
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.results_file import Results
from bench.harness.timing import Deadline, interleave, spread
from bench.kernels import ops

SIZES = {
    "full": {"square": 8192, "copy": 2**30, "rows": (2048, 8192, 16384, 65536), "widths": (768, 1024, 1152),
             "heads": 1024, "tokens": (256, 1024), "d": (64, 72), "batch": 64, "parameters": 2**28},
    "tiny": {"square": 64, "copy": 2**12, "rows": (64,), "widths": (64,), "heads": 8, "tokens": (16,), "d": (64, 72),
             "batch": 8, "parameters": 2**12},
}  # fmt: skip
PARTS = ("ceilings", "attention", "optimizers", "linears", "packed", "ops")  # by what they teach


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all of them if absent")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes of a dry run")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on one row")
    parser.add_argument("--minutes", type=float, help="after which the rows that are left are not measured")
    parser.add_argument(
        "--json", type=Path, help="where to write; default bench/results/<device>/<date>-calibrate.json"
    )


class Bench:
    """The device, the sizes, and what a row is made of."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.seconds = arguments.device, arguments.seconds
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.size = SIZES["tiny" if arguments.tiny else "full"]
        self.tiny, self.least = arguments.tiny, 2 if arguments.tiny else 5

    def normal(self, *shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_(grad)

    def rows(self, part: str, calls: dict[str, Callable], flops: float = 0, nbytes: float = 0) -> Iterator[dict]:
        """One row for each call that runs; a call that cannot says why, in place of its numbers."""
        good: dict[str, Callable] = {}
        for name, call in calls.items():
            try:
                call()
                good[name] = call
            except (RuntimeError, ImportError, NotImplementedError) as error:
                yield {"part": part, "name": name, "cannot": str(error).strip().partition("\n")[0]}
        for name, t in interleave(good, self.device, self.seconds, self.least).items():
            ms = t["p50_ms"]
            yield {"part": part, "name": name, **t, "tflop_s": flops / ms * 1e-9, "gb_s": nbytes / ms * 1e-6}


def ceilings(b: Bench) -> Iterator[dict]:
    """A square matmul; a copy, bytes read and written."""
    n, a = b.size["square"], b.normal(b.size["square"], b.size["square"])
    yield from b.rows("ceilings", {f"matmul {n}": lambda: a @ a}, flops=2 * n**3)
    x = b.normal(b.size["copy"])
    y = torch.empty_like(x)
    yield from b.rows("ceilings", {"copy": lambda: y.copy_(x)}, nbytes=2 * x.nbytes)


def linears(b: Bench) -> Iterator[dict]:
    """The four linears of a block at each width and number of tokens, with their bias; the first of the MLP with GELU."""
    for d in b.size["widths"]:
        for m in b.size["rows"]:
            for name, d_in, d_out in (("qkv", d, 3 * d), ("proj", d, d), ("fc1", d, 4 * d), ("fc2", 4 * d, d)):
                x, w, bias = b.normal(m, d_in), b.normal(d_out, d_in), b.normal(d_out)
                calls = {f"{name} D{d} M{m}": lambda x=x, w=w, bias=bias: F.linear(x, w, bias)}
                if name == "fc1":
                    calls[f"{name}+gelu D{d} M{m}"] = lambda x=x, w=w, bias=bias: F.gelu(
                        F.linear(x, w, bias), approximate="tanh"
                    )
                yield from b.rows("linears", calls, flops=2 * m * d_in * d_out)


def packed(b: Bench) -> Iterator[dict]:
    """A linear's value and tangent as two matmuls, as they are, or one over both: of tensors that lie side by side already
    (the most that packing can win; its bias left to the next op) and of tensors that have to be put there."""
    for d in b.size["widths"] if b.device == "cuda" or b.tiny else (384, 768):
        for m in b.size["rows"] if b.device == "cuda" or b.tiny else (2048,):
            for k in (m // 4, m):
                for name, d_in, d_out in (("qkv", d, 3 * d), ("proj", d, d), ("fc1", d, 4 * d), ("fc2", 4 * d, d)):
                    both, w, bias = b.normal(m + k, d_in), b.normal(d_out, d_in), b.normal(d_out)
                    x, x_dot = both[:m], both[m:].clone()
                    same = torch.equal(F.linear(both, w)[:m], F.linear(x, w))
                    label = f"{name} D{d} M{m}+{k}"
                    calls = {
                        f"{label} two": lambda x=x, y=x_dot, w=w, bias=bias: (F.linear(x, w, bias), F.linear(y, w)),
                        f"{label} one": lambda both=both, w=w: F.linear(both, w),
                        f"{label} one, copied": lambda x=x, y=x_dot, w=w: F.linear(torch.cat((x, y)), w),
                    }
                    for row in b.rows("packed", calls, flops=2 * (m + k) * d_in * d_out):
                        yield row | {"value_bits_equal": same}


def attention(b: Bench) -> Iterator[dict]:
    """SDPA forward and backward by each of its backends."""
    for t in b.size["tokens"]:
        for d in b.size["d"]:
            q, k, v = (b.normal(b.size["heads"] // 8, 8, t, d, grad=True) for _ in range(3))
            g, flops = b.normal(*q.shape), 4 * b.size["heads"] * t * t * d
            kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            forward, both = {}, {}
            for kind in kinds if b.device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]:

                def run(kind=kind, q=q, k=k, v=v):
                    with sdpa_kernel(kind):
                        return F.scaled_dot_product_attention(q, k, v)

                name = f"{kind.name.lower()} T{t} d{d}"
                forward[f"{name} forward"] = lambda run=run: run().detach()
                both[f"{name} forward+backward"] = lambda run=run, xs=(q, k, v), g=g: torch.autograd.grad(run(), xs, g)
            yield from b.rows("attention", forward, flops=flops)
            yield from b.rows("attention", both, flops=3.5 * flops)


def op_rows(b: Bench) -> Iterator[dict]:
    """The ops with a tangent at k = 0, B/4 and B, every backend and the compiled reference, checked against float64."""
    arguments = argparse.Namespace(device=b.device, compile=not b.tiny, seconds=b.seconds)
    for op in ("attention", "modulated_norm", "gated_residual", "gelu", "qk_norm"):
        sizes = [{"T": t, "d": d} for t in b.size["tokens"] for d in b.size["d"]] if op == "attention" else [{}]
        for case in cases_of(op).BENCH:
            if b.tiny:
                names = {f.name for f in dataclasses.fields(case)}
                case = dataclasses.replace(case, **{k: v for k, v in {"T": 16, "D": 64, "H": 2}.items() if k in names})
            for size in sizes:
                for row in ops.measure(
                    op, ops.resize(dataclasses.replace(case, **size), b.size["batch"]), b.dtype, arguments
                ):
                    ms = row.get("p50_ms")
                    rates = {"tflop_s": row["flops"] / ms * 1e-9, "gb_s": row["nbytes"] / ms * 1e-6} if ms else {}
                    yield (
                        {"part": "ops", "name": f"{op} {row['case']} {row['backend']}", "cannot": row["wrong"]}
                        | row
                        | rates
                    )


def optimizers(b: Bench) -> Iterator[dict]:
    """adamw_ema of each backend and torch's fused AdamW, which has no EMA, over one flat fp32 buffer."""
    n = b.size["parameters"]
    p, g, m, v, e = (torch.randn(n, device=b.device).abs() for _ in range(5))
    functions = {f"adamw_ema {name}": implementation("adamw_ema", name) for name in backends_on("adamw_ema", b.device)}
    calls = {name: lambda f=f: f(p, g, m, v, [e], [0.999], 1, 1e-4) for name, f in functions.items()}
    yield from b.rows("optimizers", calls, nbytes=36 * n)  # reads p, g, m, v, e, writes p, m, v, e
    leaf = torch.nn.Parameter(p.clone())
    leaf.grad = g.clone()
    fused = torch.optim.AdamW([leaf], lr=1e-4, fused=True)
    yield from b.rows("optimizers", {"torch fused AdamW": fused.step}, nbytes=28 * n)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if an op of ours is wrong."""
    for part in arguments.part:
        if part not in PARTS:
            raise SystemExit(f"calibrate: {part!r} is not valid; valid are {', '.join(PARTS)}")
    b = Bench(arguments)
    results = Results("calibrate", b.device, arguments.json, dtype=str(b.dtype), tiny=b.tiny)
    results.plan(arguments.part or PARTS)
    deadline = Deadline(arguments.minutes)
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}")
    functions = dict(zip(PARTS, (ceilings, attention, optimizers, linears, packed, op_rows)))
    for part in arguments.part or PARTS:
        rows, n = functions[part](b), 0
        while not deadline.over and (row := next(rows, None)) is not None:
            n += 1
            results.add(row)
            print(line(part, row), flush=True)
        if deadline.over:
            results.skip(part, f"{n} rows of it are there")
            continue
        results.done(part)
        if part == "ceilings":
            summed_up(results)
    results["spread_median"] = spread(results["rows"])
    print("written to", results.path)
    return int(any(row.get("wrong") for row in results["rows"]))


def line(part: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    if row.get("cannot"):
        return f"{part:11} {row['name']:52} no time: {row['cannot']}"
    return (
        f"{part:11} {row['name']:52} {row['p50_ms']:9.4f} ms "
        f"({row['p20_ms']:.4f}-{row['p80_ms']:.4f}) {row['tflop_s']:8.1f} TFLOP/s {row['gb_s']:8.1f} GB/s"
    )


def summed_up(results: Results) -> None:
    """The ceilings where the cost model looks for them: the card's rates in its estimates are then these."""
    best = {row["name"].split()[0]: row for row in results["rows"] if "p50_ms" in row}
    if {"matmul", "copy"} <= best.keys() and "bfloat16" in results["dtype"]:
        results["matmul_flop_s"] = {"bf16": best["matmul"]["tflop_s"] * 1e12}
        results["roof"] = {"gb_s": best["copy"]["gb_s"], "gflop_s": best["matmul"]["tflop_s"] * 1e3}
