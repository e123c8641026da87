"""`python -m bench predict`: what a GPU's ceilings allow, for machines without one. Predicted, not measured.

Ops: the bytes and FLOPs of the cases that `python -m bench ops --device cuda --batch 64` times, over a copy's GB/s and a
matmul's FLOP/s of the card; no launch, no latency: a kernel takes longer. Steps: a cost model of a DiT's training step,
matmuls at a share of the ceiling, attention at rates published for such shapes, elementwise passes and the optimizer at the
bandwidth of a copy. `make gpu` measures the same rows, and `bench step` prints both.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import OPS
from cmt_kernels.cases import cases_of

from bench import ROOT
from bench.ops import resize

# copy GB/s and bf16 matmul GFLOP/s of a large call, measured with torch on one card of each kind before this project
CEILINGS = {"h100": (3.0e3, 798e3), "h200": (4.3e3, 790e3)}
TARGET = ROOT / "bench" / "results" / "predicted" / "ops.json"
STEPS = TARGET.with_name("steps.json")

GEMM = {"B": 0.70, "L": 0.78, "XL": 0.82}  # of the matmul ceiling that linears of these widths are assumed to reach
ATTENTION = {256: (200e3, 160e3, 190e3), 1024: (330e3, 270e3, 330e3)}  # GFLOP/s: forward, backward, with tangents
# elementwise passes over a block's activations forward, backward and with tangents; bytes a parameter of optimizer and EMA
# a step: torch.compile of our duals, our kernels
PASSES = {"compile": (20, 52, 45, 76), "kernels": (12, 19, 24, 38)}
PARAMETERS = {"B": 130.3e6, "L": 457.8e6, "XL": 674.8e6}
BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=64, help="rows per call; k scales with it")
    parser.add_argument("--json", type=Path, default=TARGET)


def rows(batch: int) -> list[dict[str, Any]]:
    """A row for each op and case: bytes, FLOPs, the roof that binds and the microseconds it allows on each card."""
    out = []
    for op in OPS:
        module = cases_of(op)
        dtype = torch.bfloat16 if torch.bfloat16 in module.DTYPES else torch.float32
        for case in (resize(c, batch) for c in module.BENCH):
            nbytes, flops = module.nbytes(case, dtype.itemsize), module.flops(case)
            row = {
                "op": op,
                "case": case.id,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": nbytes,
                "flops": flops,
            }
            for card, (gb_s, gflop_s) in CEILINGS.items():
                memory, matmul = 1e-3 * nbytes / gb_s, 1e-3 * flops / gflop_s
                row[card] = {"us": max(memory, matmul), "roof": "memory" if memory >= matmul else "matmul"}
            out.append(row)
    return out


def training_us(objective: str, size: str, tokens: int, way: str, card: str) -> float:
    """Microseconds a student image in bf16, batch 64, one GPU: FM forward + backward + optimizer, CMT a teacher forward
    more, MF a quarter of its rows with tangents, ECT a target forward, ECD that and two of a teacher."""
    from bench.step import forward_flops
    from cmt_fast.models.dit import SIZES

    width, depth, heads = SIZES[size]
    gb_s, gflop_s = CEILINGS[card]
    forward, backward, dual, optimizer = PASSES[way]
    f, attention = forward_flops(width, depth, tokens, True)
    linears = (f - attention) * 1e-3 / (GEMM[size] * gflop_s)
    attention *= 1e-3
    padded, ours = (96 / 72, 80 / 72) if width // heads == 72 else (1.0, 1.0)  # flash attention's tiles, and ours
    one_pass = 2 * tokens * width * depth * 1e-3 / gb_s
    by = ATTENTION[256 if tokens <= 256 else 1024]
    forward_us = linears + padded * attention / by[0] + forward * one_pass
    backward_us = 2 * linears + 2.5 * padded * attention / by[1] + backward * one_pass
    dual_us = 2 * linears + 3 * ours * attention / by[2] + dual * one_pass
    us = forward_us + backward_us + optimizer * PARAMETERS[size] * 1e-3 / gb_s / BATCH
    if objective == "MF":
        return us + 0.25 * (dual_us - forward_us)
    return us + {"FM": 0, "CMT-CM": 1, "CMT-MF": 1, "ECT": 1, "ECD": 3}[objective] * forward_us


def step_us(objective: str, model: str, how: str, precision: str) -> float | None:
    """The prediction that stands beside a measured row: ours compiled in bf16, on a card whose ceilings are known."""
    card = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    card = next((c for c in CEILINGS if c in card), None)
    size = model.rstrip("0123456789")
    if card is None or size not in GEMM or how != "compiled" or precision != "bf16":
        return None
    return training_us(objective, size, int(model[len(size) :]), "compile", card)


def steps() -> list[dict[str, Any]]:
    """A row for each network and objective: microseconds an image on each card, torch.compile alone and with our kernels."""
    return [
        {"model": f"{size}{tokens}", "objective": objective}
        | {card: {way: training_us(objective, size, tokens, way, card) for way in PASSES} for card in CEILINGS}
        for size in GEMM
        for tokens in ATTENTION
        for objective in ("FM", "CMT-CM", "MF")
    ]


def run(arguments: argparse.Namespace) -> int:
    """Print the tables and write them as JSON, marked as predicted."""
    found = rows(arguments.batch)
    print("PREDICTED from ceilings, not measured: at least so many microseconds")
    for row in found:
        cells = "  ".join(f"{card} {row[card]['us']:9.1f} ({row[card]['roof']})" for card in CEILINGS)
        print(f"{row['op']:17} {row['case']:40} {row['dtype']:8} {cells}")
    training = steps()
    print(
        "PREDICTED from a cost model, not measured: microseconds a student image of a step, compiled and with kernels"
    )
    for row in training:
        cells = "  ".join(f"{card} {' '.join(f'{us:8.0f}' for us in row[card].values())}" for card in CEILINGS)
        print(f"{row['model']:8} {row['objective']:7} {cells}")
    ceilings = {card: dict(zip(("gb_s", "gflop_s"), c)) for card, c in CEILINGS.items()}
    about = {"predicted": True, "date": date.today().isoformat(), "ceilings": ceilings}
    for path, table in ((arguments.json, found), (arguments.json.with_name(STEPS.name), training)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
        print("written to", path)
    return 0
