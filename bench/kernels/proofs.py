"""What attention's proof at first use costs, in ms: value, tangent and gradient of the recipes' networks, at their heads.

A launch is proven once on a card and remembered, so each shape is asked for twice in homes of their own: in one process after
all others, and alone in a new process, where the proof also pays for what a process does first in float64. As in a network a
linear layer comes before it, forward and backward: `start_ms` is what that took, and is no part of the proof. Compiling the
kernels is left out too: that is paid with or without one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cmt_kernels.attention import proof
from cmt_kernels.cases import Draw, backends_on, implementation
from torch import Tensor, nn

from bench.harness.results_file import Results
from bench.harness.timing import Deadline
from bench.harness.worker import Died, Late, Refused, Worker
from bench.kernels.sweep import TYPES, three

# network: tokens, heads, head dim; one that a recipe trains in float32 comes in both types
SHAPES = {
    "XL/2, 256 tokens": (256, 16, 72),
    "XL/2, 1024 tokens": (1024, 16, 72),
    "digits": (16, 4, 32),
    "B/2, 256 tokens": (256, 12, 64),
    "L/2, 1024 tokens": (1024, 16, 64),
}
CASES = [(name, "bf16") for name in SHAPES] + [("digits", "fp32"), ("B/2, 256 tokens", "fp32")]
NEW = [("XL/2, 256 tokens", "bf16"), ("XL/2, 1024 tokens", "bf16"), ("digits", "bf16"), ("digits", "fp32")]
B, K = 4, 2
PROMISED_MS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="after which the shapes that are left are named")
    parser.add_argument("--tiny", action="store_true", help="a dry run: the digits' shape")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-proofs.json")


def answer(state: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """In a worker: what the launches of one shape took to prove, label -> ms, and what was decided of each."""
    t, h, d = message["shape"]
    function = implementation("attention", backends_on("attention", message["device"])[0])
    begun, known = time.perf_counter(), proof.spent().keys()
    draw = Draw(TYPES[message["dtype"]], message["device"])
    g = draw.normal(B, t, h * d)
    qkv = linear(g, draw.normal(3 * h * d, h * d)).unflatten(2, (3, h, d))
    start_ms = 1e3 * (time.perf_counter() - begun)
    three(function, qkv, draw.normal(K, t, 3, h, d), g)
    took = {label: ms for label, ms in proof.spent().items() if label not in known}
    return {"ms": took, "start_ms": start_ms, "lines": [proof.table()[label] for label in took]}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, after its gradient was taken too."""
    x, weight = x.clone().requires_grad_(True), weight.requires_grad_(True)
    y = nn.functional.linear(x, weight)
    torch.autograd.grad(y.float().square().mean(), (x, weight))
    if y.is_cuda:
        torch.cuda.synchronize()
    return y.detach()


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a shape took longer than promised."""
    cases, deadline = (CASES[2:3] if arguments.tiny else CASES), Deadline(arguments.minutes)
    todo = [("shared", *case) for case in cases] + [("new", *case) for case in cases if case in NEW]
    results = Results("proofs", arguments.device, arguments.json, tiny=arguments.tiny)
    results.plan(f"{name} {dtype} in a {process} process" for process, name, dtype in todo)
    print(
        f"{results['device']}, torch {results['torch']}, commit {results['commit']}; at most {PROMISED_MS:.0f} ms a shape"
    )
    worker: Worker | None = None
    with tempfile.TemporaryDirectory() as homes:
        for i, (process, name, dtype) in enumerate(todo):
            if deadline.over:
                break
            if process == "new" and worker:
                worker.close()
                worker = None
            worker = worker or Worker("bench.kernels.proofs", env={"XDG_CACHE_HOME": f"{homes}/{i}"})
            row = {
                "network": name,
                "dtype": dtype,
                "process": process,
                "shape": SHAPES[name],
                "device": arguments.device,
            }
            try:
                row |= worker.ask(row, max(1.0, deadline.left_s))
            except (Died, Late, Refused) as fault:
                row["crash"] = str(fault)
                worker.kill()
                worker = None
            results.add(row)
            results.done(f"{name} {dtype} in a {process} process")
            print(line(row), flush=True)
        if worker:
            worker.close()
    print(f"written to {results.path}")
    return int(any("crash" in row or sum(row["ms"].values()) > PROMISED_MS for row in results["rows"]))


def line(row: dict[str, Any]) -> str:
    """One line of the table: all launches of a shape together, and each."""
    label = f"{row['network']:18} {row['dtype']} {row['process']:6}"
    if "crash" in row:
        return f"{label} CRASH {row['crash']}"
    each = "  ".join(f"{' '.join(name.split()[1:2] + name.split()[6:])} {ms:.0f}" for name, ms in row["ms"].items())
    return f"{label} {sum(row['ms'].values()):6.0f} ms: {each or 'nothing is proven here'}  after {row['start_ms']:.0f}"
