"""`python -m bench predict`: what a GPU's ceilings allow each op, for machines without one. Predicted, not measured.

The bytes and FLOPs of the cases that `python -m bench ops --device cuda --batch 64` times, over a copy's GB/s and a
matmul's FLOP/s of the card. No launch, no latency: a kernel takes longer. `make gpu` measures the same rows.
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


def run(arguments: argparse.Namespace) -> int:
    """Print the table and write it as JSON, marked as predicted."""
    found = rows(arguments.batch)
    print("PREDICTED from ceilings, not measured: at least so many microseconds")
    for row in found:
        cells = "  ".join(f"{card} {row[card]['us']:9.1f} ({row[card]['roof']})" for card in CEILINGS)
        print(f"{row['op']:17} {row['case']:40} {row['dtype']:8} {cells}")
    ceilings = {card: dict(zip(("gb_s", "gflop_s"), c)) for card, c in CEILINGS.items()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    about = {"predicted": True, "date": date.today().isoformat(), "ceilings": ceilings, "rows": found}
    arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    print("written to", arguments.json)
    return 0
