"""Attention over tokens and head dims: value, tangent and gradient beside float64 plain torch, each shape in a worker.

A kernel may be right at every shape that a test names and wrong at the next one, or take the whole process along by a read out
of bounds. So shapes go to workers, a few at once (what takes time is compiling); a worker that dies names its shape, and another
goes on. A shape is wrong where an error, as a share of the float64 norm, is more than twice plain torch's own at that dtype plus
twice what rounding to it and recomputing p from float32 logits cost: over a whole tensor that holds for any order of sums. A few
small shapes run under compute-sanitizer besides, where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import Dual
from cmt_kernels.attention import proof
from cmt_kernels.cases import Draw, backends_on, implementation

from bench.harness.results_file import Results
from bench.harness.timing import Deadline
from bench.harness.worker import Died, Late, Refused, Worker

B, H, K = 3, 2, 2
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# tokens of the recipes and of the networks that they are made for, then sizes that fill no tile; head dims likewise
TOKENS = (64, 256, 16, 1024, 77, 33, 100, 4, 1, 128, 196, 250, 576, 1100, 7, 31, 48, 65, 127, 300, 513, 1000)
DIMS = (72, 64, 36, 96, 32, 128, 80, 16, 40, 48, 112, 24, 56, 88)
UNDER_SANITIZER = ((16, 40), (16, 96), (64, 72), (33, 36), (256, 64))
TINY = {"tokens": (16, 7), "dims": (16, 36), "dtypes": ("fp32",), "sanitizer": ((7, 16),)}
LONGEST_S = 120.0  # of one shape: a compilation or two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of the op attention; default the one that runs on this device")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 22 sizes of 1 to 1100")
    parser.add_argument("--dims", type=int, nargs="+", help="head dims; default 14 sizes of 16 to 128")
    parser.add_argument("--dtypes", choices=TYPES, nargs="+", help="default both")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, help="after which the shapes that are left are named")
    parser.add_argument("--tiny", action="store_true", help="a dry run: four shapes")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-sweep.json")


def shapes(tokens: tuple[int, ...], dims: tuple[int, ...], dtypes: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(T, d, dtype): those early in both lists first, bf16 before float32."""
    ranked = sorted(itertools.product(range(len(dtypes)), range(len(tokens)), range(len(dims))), key=sum_of_ranks)
    return [(tokens[i], dims[j], dtypes[n]) for n, i, j in ranked]


def sum_of_ranks(at: tuple[int, int, int]) -> tuple[int, int, int]:
    dtype, token, dim = at
    return 6 * dtype + token + dim, token, dim


# ------------------------------------------------------------------------------------------------- in a worker


def answer(state: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """The row of one shape."""
    return compare(message["T"], message["d"], message["dtype"], message["device"], message["backend"])


def compare(t: int, d: int, dtype: str, device: str, backend: str) -> dict[str, Any]:
    """Errors of value, tangent and gradient as shares of their float64 norms, what each may be, and which are wrong;
    proof_ms: the dearest proof of a launch of this shape, None where nothing is proven."""
    function, plain = implementation("attention", backend), implementation("attention", "reference")
    draw = Draw(TYPES[dtype], device)
    x, x_dot, g = (draw.normal(n, t, 3, H, d) for n in (B, K, B))
    g = g[:, :, 0].flatten(2)
    before = proof.spent()
    got, bits = three(function, x, x_dot, g)
    proofs = [ms for label, ms in proof.spent().items() if label not in before]
    exact, _ = three(plain, x.double(), x_dot.double(), g.double())
    yardstick, _ = three(plain, x, x_dot, g)
    errors, limits, again = {}, {}, recomputed(x)
    for name, truth in exact.items():
        errors[name] = share(got[name], truth)
        limits[name] = 2 * (share(yardstick[name], truth) + share(truth.to(TYPES[dtype]), truth) + again)
    wrong = [name for name in errors if not errors[name] <= limits[name]] + ["bits"] * (not bits)
    return {"error": errors, "allowed": limits, "wrong": wrong, "proof_ms": max(proofs, default=None)}


def recomputed(x: torch.Tensor) -> float:
    """What p = exp(logit - its row's norm) errs by, relative, where it is computed again from float32 logits: the rounding of
    the largest of them. Plain torch keeps p, which of a single token is 1 and errs by nothing."""
    q, k, _ = x.double().permute(2, 0, 3, 1, 4)
    return torch.finfo(torch.float32).eps * ((q @ k.mT).abs().amax() * x.shape[-1] ** -0.5).item()


def three(function: Any, x: torch.Tensor, x_dot: torch.Tensor, g: torch.Tensor) -> tuple[dict[str, torch.Tensor], bool]:
    """Value, tangent, gradient; and whether the value beside a tangent is the plain value, bit for bit."""
    leaf = x.clone().requires_grad_(True)
    y = function(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, g)
    with torch.no_grad():
        both = function(Dual(x, x_dot))
    same = torch.equal(both.value, y)
    return {"value": y.detach(), "tangent": both.tangent, "gradient": gradient}, same


def share(y: torch.Tensor, exact: torch.Tensor) -> float:
    """|y - exact| / |exact|, norms in float64."""
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


# ------------------------------------------------------------------------------------------------- in the parent


class Sweep:
    """The shapes, taken by several workers in turns, a row written after each."""

    def __init__(self, results: Results, device: str, backend: str, deadline: Deadline) -> None:
        self.results, self.device, self.backend, self.deadline = results, device, backend, deadline
        self.lock = threading.Lock()

    def work(self, todo: list[tuple[int, int, str]], prefix: tuple[str, ...] = (), env: dict | None = None) -> None:
        """Take shapes from the front of `todo` until it is empty; a fresh worker after each that died."""
        worker, under = None, {"under": Path(prefix[0]).name} if prefix else {}
        try:
            while not self.deadline.over:
                with self.lock:
                    if not todo:
                        return
                    t, d, dtype = todo.pop(0)
                row = {"T": t, "d": d, "dtype": dtype, "backend": self.backend} | under
                worker = worker or Worker("bench.kernels.sweep", prefix, env)
                try:
                    row |= worker.ask(row | {"device": self.device}, min(LONGEST_S, max(1.0, self.deadline.left_s)))
                except Refused as fault:
                    row["crash"] = str(fault)
                    if not fault.usable:
                        worker.kill()
                        worker = None
                except (Died, Late) as fault:
                    worker, row["crash"] = None, str(fault)
                    if isinstance(fault, Late) and self.deadline.over:
                        with self.lock:
                            todo.insert(0, (t, d, dtype))
                        return
                with self.lock:
                    if not under:
                        self.results.data["not_measured"] = left(todo, self.results["asked"])
                    self.results.add(row)
                    print(line(row), flush=True)
        finally:
            if worker:
                worker.close(30.0 if prefix else 5.0)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    label = f"{row['dtype']} T{row['T']:<5} d{row['d']:<4} {row.get('under', row['backend']):16}"
    if "crash" in row:
        return f"{label} CRASH {row['crash']}"
    errors = "  ".join(f"{name} {e:.1e}" for name, e in row["error"].items())
    proven = f"  proven in {row['proof_ms']:.0f} ms" if row["proof_ms"] is not None else ""
    return f"{label} {'WRONG ' + ' '.join(row['wrong']) if row['wrong'] else 'ok'}  {errors}{proven}"


def left(todo: list[tuple[int, int, str]], asked: int) -> list[str]:
    """The shapes that were not taken yet, as one name."""
    return [f"{len(todo)} of {asked} shapes: {' '.join(f'T{t}-d{d}-{dtype}' for t, d, dtype in todo)}"] if todo else []


def sanitizer() -> str | None:
    """compute-sanitizer, of PATH or of the CUDA toolkit."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitized(sweep: Sweep, tool: str, todo: list[tuple[int, int, str]], log: Path) -> dict[str, Any]:
    """What memcheck says of a few shapes, each tensor of them an allocation of its own."""
    begun, asked = time.monotonic(), len(todo)
    sweep.work(todo, (tool, "--tool", "memcheck", "--log-file", str(log)), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    counted = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    said = [x.removeprefix("=========").strip() for x in text.splitlines() if "Invalid" in x or "Error" in x]
    errors = sum(map(int, counted)) if counted else None
    return {"tool": tool, "shapes": asked - len(todo), "errors": errors, "first": said[:3],
            "seconds": time.monotonic() - begun}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a shape is wrong or crashed."""
    of = lambda name, default: tuple(getattr(arguments, name) or (TINY[name] if arguments.tiny else default))
    todo = shapes(of("tokens", TOKENS), of("dims", DIMS), of("dtypes", tuple(TYPES)))
    device, asked = arguments.device, len(todo)
    backend = arguments.backend or backends_on("attention", device)[0]
    results = Results(
        "sweep", device, arguments.json, tiny=arguments.tiny, backend=backend, asked=asked, sanitizer=None
    )
    results.plan(left(todo, asked))
    sweep = Sweep(results, device, backend, Deadline(arguments.minutes))
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}; attention: {backend}")
    tool, workers = sanitizer(), 1 if arguments.tiny else arguments.workers
    few = [
        (t, d, "fp32" if arguments.tiny else "bf16")
        for t, d in (TINY["sanitizer"] if arguments.tiny else UNDER_SANITIZER)
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers + 1) as pool:
        checked = pool.submit(sanitized, sweep, tool, few, Path(folder) / "log") if tool else None
        for done in [pool.submit(sweep.work, todo) for _ in range(workers)]:
            done.result()
        if checked:
            results["sanitizer"] = checked.result()
            print("compute-sanitizer:", results["sanitizer"], flush=True)
        else:
            results.skip("compute-sanitizer, which is not installed")
    if few and tool:
        results.skip(f"under compute-sanitizer: {' '.join(f'T{t}-d{d}' for t, d, _ in few)}")
    for name in left(todo, asked):
        print(f"not measured: {name}")
    bad = [row for row in results["rows"] if row.get("wrong") or "crash" in row]
    print(f"{len(results['rows'])} shapes, {len(bad)} wrong or crashed; written to {results.path}")
    for row in bad:
        print(line(row))
    return int(bool(bad) or bool((results["sanitizer"] or {}).get("errors")))
