"""`python -m bench predict`: what a GPU's ceilings allow, for machines without one. Predicted, not measured.

Ops: the bytes and FLOPs of the cases that `python -m bench ops --device cuda --batch 64` times, over a copy's GB/s and a
matmul's FLOP/s of the card, as `python -m bench calibrate` measured them where its results lie in bench/results; no launch,
no latency: a kernel takes longer. Steps: the trainer's cost model (`cmt estimate`), bare and, on a card whose steps were
measured, scaled by measured over predicted. `make gpu` measures the same rows; `bench step` prints both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import OPS
from cmt_kernels.cases import cases_of

from bench.harness.results_file import ROOT
from bench.kernels.ops import resize
from cmt_fast.config.schema import Dit
from cmt_fast.cost import estimate, hardware
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.hardware import CARDS, Card

MEASURED = ROOT / "bench" / "results"
TARGET = MEASURED / "predicted" / "ops.json"
STEPS = TARGET.with_name("steps.json")

GPUS = ("h100", "h200")
SIZES, TOKENS, OBJECTIVES = ("B", "L", "XL"), (256, 1024), ("FM", "CMT-CM", "MF")
WAYS = ("compile", "fused")  # torch.compile of the duals; with the kernels too
BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=64, help="rows per call; k scales with it")
    parser.add_argument("--json", type=Path, default=TARGET)


def rows(batch: int, known: dict[str, Card]) -> list[dict[str, Any]]:
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
            for name, card in known.items():
                memory, matmul = 1e6 * nbytes / card.copy, 1e6 * flops / card.matmul["bf16"]
                row[name] = {"us": max(memory, matmul), "roof": "memory" if memory >= matmul else "matmul"}
            out.append(row)
    return out


def training(
    objective: str, size: str, tokens: int, way: str, card: Card, batch: int = BATCH, teacher: float = 1.0
) -> tuple[float, str]:
    """(microseconds a student image of a DiT's step in bf16 on one GPU, how to mark it); teacher: its forwards an image.

    The bare cost model for a card without measured steps (`Card.steps`), else scaled by them as `cmt estimate` does. By torch
    op by op (`way` "eager") every row of MeanFlow has a tangent, as published codes have it.
    """
    side = 2 * math.isqrt(tokens)
    net = flops_.network(Dit(size=size), "linear", (4, side, side), 1000)
    work = estimate.step_work(objective, teacher)
    if way == "eager":
        work = [term._replace(times=1.0) if term.kind == "tangent" else term for term in work]
    bill = estimate.reckon(work, {"student": net, "teacher": net}, batch, batch, card, 1, estimate.Way("bf16", way))
    return bill.step_us / batch, bill.mark


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
    return training(objective, size, int(model[len(size) :]), way, CARDS[card], batch, teacher)[0]


def steps(known: dict[str, Card]) -> list[dict[str, Any]]:
    """A row for each network and objective: microseconds an image on each card by the bare model, torch.compile alone and
    with our kernels; `scaled`, of the latter, and its mark where steps of the card were measured, else None."""
    out = []
    for size, tokens, objective in itertools.product(SIZES, TOKENS, OBJECTIVES):
        row: dict[str, Any] = {"model": f"{size}{tokens}", "objective": objective}
        for name, card in known.items():
            bare = card._replace(steps=())
            us = {way: training(objective, size, tokens, way, bare)[0] for way in WAYS}
            scaled, mark = training(objective, size, tokens, "fused", card) if card.steps else (None, None)
            row[name] = us | {"scaled": scaled, "mark": mark}
        out.append(row)
    return out


def cell(us: float | None) -> str:
    return f"{us:8.0f}" if us is not None else " " * 8


def run(arguments: argparse.Namespace) -> int:
    """Print the tables and write them as JSON, marked as predicted."""
    known = {name: hardware.card(name, MEASURED) for name in GPUS}
    found = rows(arguments.batch, known)
    print("PREDICTED from ceilings, not measured: at least so many microseconds")
    for row in found:
        cells = "  ".join(f"{card} {row[card]['us']:9.1f} ({row[card]['roof']})" for card in GPUS)
        print(f"{row['op']:17} {row['case']:40} {row['dtype']:8} {cells}")
    whole = steps(known)
    print(
        "PREDICTED from a cost model: microseconds a student image of a step, compiled, with kernels, and the latter scaled"
    )
    for row in whole:
        cells = "  ".join(f"{card} {' '.join(cell(us) for us in list(row[card].values())[:3])}" for card in GPUS)
        print(f"{row['model']:8} {row['objective']:7} {cells}")
    ceilings = {
        name: {"gb_s": card.copy * 1e-9, "gflop_s": card.matmul["bf16"] * 1e-9, "measured": card.measured}
        for name, card in known.items()
    }
    about = {"predicted": True, "date": date.today().isoformat(), "ceilings": ceilings}
    for path, table in ((arguments.json, found), (arguments.json.with_name(STEPS.name), whole)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
        print("written to", path)
    return 0
