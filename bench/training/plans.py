"""`cmt plan` of the large recipes and a small one on three kinds of machine, and its count of activations beside an H100's.

Predicted, but for what an H100 was measured to save and to hold: those are read from bench/results/h100. The tables of
docs/performance.md are made of this file.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import date
from pathlib import Path
from typing import Any

from bench.harness.results_file import ROOT, commit
from cmt_fast.cli import plan as command
from cmt_fast.config import loading
from cmt_fast.cost import activations
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.hardware import card

MEASURED = ROOT / "bench" / "results"
TARGET = MEASURED / "predicted" / "plans.json"
TRAINED, ALL = ["mid", "post"], ["pre", "mid", "post"]
# recipe, card, how many, hours on the clock, stages, overrides
CASES = (
    ("imagenet512-ecd", "h100", 8, 15.0, TRAINED, ()),
    ("imagenet256-mf", "h100", 8, 15.0, TRAINED, ()),
    ("imagenet256-mf", "rtx4090", 1, 168.0, TRAINED, ()),
    ("cifar10", "rtx4090", 1, 24.0, TRAINED, ()),
    ("digits", "laptop", 1, 0.05, ALL, ()),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the JSON goes."""
    parser.add_argument("--json", type=Path, default=TARGET)


def run(arguments: argparse.Namespace) -> int:
    """Make every plan, print it and write all of them as JSON, marked as predicted."""
    plans = [planned(*case) for case in CASES]
    for found in plans:
        print("\n".join(command.text(found)), end="\n\n")
    kept = counted()
    for row in kept:
        print(
            f"{row['step']:44} measured {row['saved_gb']:6.2f} GB, counted {row['counted_gb']:6.2f}, {row['ratio']:.3f}"
        )
    about = {"predicted": True, "date": date.today().isoformat(), "commit": commit()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(about | {"plans": plans, "activations": kept}, indent=1) + "\n")
    print("written to", arguments.json)
    return 0


def planned(
    recipe: str, gpu: str, gpus: int, hours: float, names: list[str], overrides: tuple[str, ...]
) -> dict[str, Any]:
    """A plan as `cmt plan --json` prints it."""
    found = command.figures(loading.load(recipe, overrides), names, card(gpu, MEASURED), gpus, hours)
    asked = argparse.Namespace(recipe=recipe, overrides=list(overrides), gpu=gpu, gpus=gpus)
    return found | {"commands": command.commands(asked, found)}


def counted() -> list[dict[str, Any]]:
    """Bytes that every measured step of an H100 saved for its backward, beside the count of this machine's ops."""
    out = []
    for step in card("h100", MEASURED).steps:
        if step.saved:
            side = 2 * math.isqrt(step.tokens)
            model = flops_.dit_model(step.width, step.depth)
            count = activations.of_model(model, "linear", (4, side, side), 1000, step.precision == "bf16").bytes(
                step.batch
            )
            name = f"{step.objective} {step.width} x {step.depth}, {step.tokens} tokens, batch {step.batch}, {step.precision}"
            sizes = {"saved_gb": step.saved / 1e9, "counted_gb": count / 1e9, "ratio": step.saved / count}
            out.append({"step": name, **sizes, "source": step.source})
    return out
