"""`python -m bench predict`: what a GPU's ceilings allow, for machines without one. Predicted, not measured.

Ops: the bytes and FLOPs of the cases that `python -m bench ops --device cuda --batch 64` times, over a copy's GB/s and a
matmul's FLOP/s of the card; no launch, no latency: a kernel takes longer. Steps: the trainer's cost model (`cmt estimate`).
`make gpu` measures the same rows, and `bench step` prints both.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import OPS
from cmt_kernels.cases import cases_of

from bench import ROOT
from bench.ops import resize
from cmt_fast import cost, estimate
from cmt_fast.cards import CARDS
from cmt_fast.schema import Dit

TARGET = ROOT / "bench" / "results" / "predicted" / "ops.json"
STEPS = TARGET.with_name("steps.json")

GPUS = ("h100", "h200")
SIZES, TOKENS, OBJECTIVES = ("B", "L", "XL"), (256, 1024), ("FM", "CMT-CM", "MF")
WAYS = ("compile", "fused")  # torch.compile of the duals; with the kernels too
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
            for card in GPUS:
                memory, matmul = 1e6 * nbytes / CARDS[card].copy, 1e6 * flops / CARDS[card].matmul["bf16"]
                row[card] = {"us": max(memory, matmul), "roof": "memory" if memory >= matmul else "matmul"}
            out.append(row)
    return out


def training_us(
    objective: str, size: str, tokens: int, way: str, card: str, batch: int = BATCH, teacher: float = 1.0
) -> float:
    """Microseconds a student image of a DiT's step in bf16, one GPU; teacher: its forwards an image of mid-training.

    By torch op by op (`way` "eager") every row of MeanFlow has a tangent, as published codes have it.
    """
    side = 2 * math.isqrt(tokens)
    net = cost.network(Dit(size=size), "linear", (4, side, side), 1000)
    work = estimate.step_work(objective, teacher)
    if way == "eager":
        work = [term._replace(times=1.0) if term.kind == "tangent" else term for term in work]
    return estimate.step_us(work, net, CARDS[card], way, "bf16", batch)


def card_of(name: str) -> str | None:
    """The card of the cost model that a device's name speaks of."""
    return next((c for c in GPUS if c in name.lower()), None)


def step_us(
    objective: str, model: str, how: str, precision: str, device: str, batch: int = BATCH, teacher: float = 1.0
) -> float | None:
    """The prediction that stands beside a measured row in bf16, on a card that the cost model knows: of torch.compile for
    a compiled step, of our kernels for an eager one, of torch op by op for the peer's."""
    card, size = card_of(device), model.rstrip("0123456789")
    way = {"compiled": "compile", "eager": "fused", "eager, recipe's points": "fused", "peer": "eager"}.get(how)
    if card is None or size not in SIZES or precision != "bf16" or way is None:
        return None
    return training_us(objective, size, int(model[len(size) :]), way, card, batch, teacher)


def steps() -> list[dict[str, Any]]:
    """A row for each network and objective: microseconds an image on each card, torch.compile alone and with our kernels."""
    return [
        {"model": f"{size}{tokens}", "objective": objective}
        | {card: {way: training_us(objective, size, tokens, way, card) for way in WAYS} for card in GPUS}
        for size in SIZES
        for tokens in TOKENS
        for objective in OBJECTIVES
    ]


def run(arguments: argparse.Namespace) -> int:
    """Print the tables and write them as JSON, marked as predicted."""
    found = rows(arguments.batch)
    print("PREDICTED from ceilings, not measured: at least so many microseconds")
    for row in found:
        cells = "  ".join(f"{card} {row[card]['us']:9.1f} ({row[card]['roof']})" for card in GPUS)
        print(f"{row['op']:17} {row['case']:40} {row['dtype']:8} {cells}")
    training = steps()
    print(
        "PREDICTED from a cost model, not measured: microseconds a student image of a step, compiled and with kernels"
    )
    for row in training:
        cells = "  ".join(f"{card} {' '.join(f'{us:8.0f}' for us in row[card].values())}" for card in GPUS)
        print(f"{row['model']:8} {row['objective']:7} {cells}")
    ceilings = {c: {"gb_s": CARDS[c].copy * 1e-9, "gflop_s": CARDS[c].matmul["bf16"] * 1e-9} for c in GPUS}
    about = {"predicted": True, "date": date.today().isoformat(), "ceilings": ceilings}
    for path, table in ((arguments.json, found), (arguments.json.with_name(STEPS.name), training)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
        print("written to", path)
    return 0
