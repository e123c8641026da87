"""Whole training steps: flow matching, CMT, MeanFlow and ECT of a DiT, eager and compiled, with the optimizer.

Images a second and a GPU-hour, MFU over the datasheet's 989 TFLOP/s and over a matmul measured in the same run, and peak
memory. FLOPs are those the algorithm needs once: a matmul is 2 a multiply-add, backward twice the forward, tangents and
no-grad forwards at what they cost, recomputation not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import table

from bench import about, interleave, quantiles, save, turns
from bench.networks import MEANFLOW, WORLD, average_velocity, batch_of, perturb
from cmt_fast import compiled
from cmt_fast.engine import LocalEngine
from cmt_fast.models.dit import SIZES, DiT
from cmt_fast.models.precond import Denoiser
from cmt_fast.objectives import ROWS, Batch, Points, World
from cmt_fast.objectives.meanflow import tangent_rows
from cmt_fast.paths import Path as ForwardPath
from cmt_fast.schema import CmtMf, Ect, Flow, Stage

DATASHEET = 989e12  # dense bf16 FLOP/s of an H100 SXM
OBJECTIVES = {"FM": Flow(), "CMT": CmtMf(), "MF": MEANFLOW, "ECT": Ect()}
TEACHER_PER_IMAGE = 1.0  # forwards of the teacher a student image: 16 steps on B/16 trajectories


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, action="append", help="default XL and B")
    parser.add_argument("--tokens", type=int, action="append", help="default 256 and 1024")
    parser.add_argument("--batch", type=int, help="default 64; 16 at 1024 tokens and more")
    parser.add_argument("--objective", choices=OBJECTIVES, action="append", help="default all")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on one step, at least 5 rounds")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time compiled steps too"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run: width 64, depth 2, 16 tokens, 8 rows; compiles MF alone"
    )
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-step.json")


def forward_flops(width: int, depth: int, tokens: int, two_times: bool) -> tuple[float, float]:
    """FLOPs of one forward of one image, and those of attention in it."""
    attention = 4 * tokens**2 * width * depth
    linears = 24 * tokens * width**2 * depth
    conditioning = 12 * width**2 * depth + 4 * width**2 + 2 * (256 * width + width**2) * (2 if two_times else 1)
    return linears + attention + conditioning + 64 * tokens * width, attention


def step_flops(name: str, f: float, attention: float, rows: int) -> float:
    """FLOPs a student image of a step: 3 forwards, and what the objective adds."""
    share = tangent_rows(rows, MEANFLOW.ratio) / rows
    extra = {"FM": 0.0, "CMT": TEACHER_PER_IMAGE * f, "MF": share * (f + attention), "ECT": f}
    return 3 * f + extra[name]


class Step:
    """One training step of one objective: data, loss, backward, optimizer, on an engine of its own."""

    def __init__(self, name: str, net: torch.nn.Module, rows: int, tokens: int, device: str, compiles: bool) -> None:
        self.name, self.config, self.batch = name, OBJECTIVES[name], batch_of(rows, tokens, device)
        precision = "bf16" if device == "cuda" else "fp32"
        stage = Stage(self.config, rows, batch=rows, precision=precision, compile=compiles)
        self.engine = LocalEngine(net, stage, torch.device(device))
        self.world = WORLD if name != "ECT" else World(ForwardPath("ve"), WORLD.random)
        self.row = ROWS[self.config.kind]

    def drawn(self) -> Batch | Points:
        """The rows; for CMT with as much work of the teacher as they cost: one forward each, without its arithmetic."""
        x, labels, sample, drop = self.batch
        if self.row.draws == "data":
            return self.batch
        t = torch.full((len(x),), 0.8, device=x.device)
        with torch.no_grad():
            v = self.engine.eager(x, t, t, labels, drop)
        return Points(x, t, x - 0.3 * v, t - 0.3, labels, drop)

    def loss(self) -> torch.Tensor:
        return self.row.function(self.engine, self.drawn(), self.config, self.world)[0].mean()

    def __call__(self) -> None:
        self.engine.backward(self.loss())
        self.engine.step(1e-4)


def network(name: str, width: int, depth: int, heads: int, tokens: int) -> torch.nn.Module:
    """The network of an objective: ECT is on the VE path."""
    if name != "ECT":
        return average_velocity(width, depth, tokens, heads)
    side = round(2 * tokens**0.5)
    return Denoiser(perturb(DiT(4, side, 10, width=width, depth=depth, heads=heads)))


def measure(name: str, shape: dict[str, int], arguments: argparse.Namespace, roof: float) -> list[dict[str, Any]]:
    """A row for the eager step and one for the compiled; the guard runs before a compiled step is timed."""
    device, rows, tokens = arguments.device, shape["batch"], shape["tokens"]
    flops = step_flops(name, *forward_flops(shape["width"], shape["depth"], tokens, name != "ECT"), rows)
    out = []
    compiles = arguments.compile and (name == "MF" or not arguments.tiny)
    for how in ["eager", "compiled"] if compiles else ["eager"]:
        step = net = None  # frees the one before
        row: dict[str, Any] = {"objective": name, "how": how, **shape, "gflop_image": flops * 1e-9}
        out.append(row)
        try:
            torch._dynamo.reset()
            net = network(name, shape["width"], shape["depth"], shape["heads"], tokens)
            step = Step(name, net, rows, tokens, device, how == "compiled")
            if how == "compiled":
                compiled.guard(step.engine, step.loss, name)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = turns({"step": step}, device, arguments.seconds, least=2 if arguments.tiny else 5)["step"]
        except (compiled.CompileError, torch.OutOfMemoryError) as error:
            row["cannot"] = " ".join(str(error).split())[:300]
            continue
        p20, p50, p80 = quantiles(times)
        images_per_s = 1e3 * rows / p50
        row |= {
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "images_per_s": images_per_s,
            "images_per_gpu_hour": 3600 * images_per_s,
            "mfu_datasheet": flops * images_per_s / DATASHEET if device == "cuda" else None,
            "mfu_measured": flops * images_per_s / roof,
            "peak_gb": torch.cuda.max_memory_allocated() * 1e-9 if device == "cuda" else None,
        }
    return out


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    label = f"{row['objective']:4} {row['size']:4} T{row['tokens']:<5} B{row['batch']:<4} {row['how']:9}"
    if "cannot" in row:
        return f"{label} no time: {row['cannot']}"
    datasheet = f"{row['mfu_datasheet']:6.1%}" if row["mfu_datasheet"] is not None else "     -"
    peak = f"{row['peak_gb']:7.2f}" if row["peak_gb"] is not None else "      -"
    return (
        f"{label} {row['p50_ms']:9.2f} ({row['p20_ms']:.2f}-{row['p80_ms']:.2f}) {row['images_per_s']:9.1f} "
        f"{row['images_per_gpu_hour']:12,.0f} {datasheet} {row['mfu_measured']:6.1%} {peak}"
    )


def matmul_roof(device: str, tiny: bool) -> float:
    """FLOP/s of a square matmul in the dtype of the step."""
    n = 8192 if device == "cuda" and not tiny else 512
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    return 2e3 * n**3 / interleave({"matmul": lambda: a @ a}, device, 0.5)["matmul"]["p50_ms"]


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON; 1 if a step cannot run."""
    roof = matmul_roof(arguments.device, arguments.tiny)
    results: dict[str, Any] = about(arguments.device) | {"matmul_flop_s": roof, "ops": table(), "rows": []}
    print(
        f"{results['device']}, torch {results['torch']}, commit {results['commit']}, matmul {roof * 1e-12:.2f} TFLOP/s"
    )
    print("step ms p50 (p20-p80), images/s, images/GPU-hour, MFU datasheet, MFU measured, peak GB")
    shapes = [
        {"size": size, "width": SIZES[size][0], "depth": SIZES[size][1], "heads": SIZES[size][2], "tokens": tokens,
         "batch": arguments.batch or (16 if tokens >= 1024 else 64)}
        for size in arguments.size or ["XL", "B"] for tokens in arguments.tokens or [256, 1024]
    ]  # fmt: skip
    if arguments.tiny:
        shapes = [{"size": "dry", "width": 64, "depth": 2, "heads": 1, "tokens": 16, "batch": 8}]
    for shape in shapes:
        for name in arguments.objective or OBJECTIVES:
            for row in measure(name, shape, arguments, roof):
                results["rows"].append(row)
                print(line(row), flush=True)
    kind = f"step-{shapes[0]['size'].lower()}{shapes[0]['tokens']}" if len(shapes) == 1 else "step"
    print("written to", save(kind, arguments.device, results, arguments.json))
    return int(any("cannot" in row for row in results["rows"]))
