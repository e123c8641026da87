"""The launches of an EDM2's training step in the ImageNet-512 recipe: `python -m bench launches --model EDM2-S,EDM2-XXL`.

Each step is counted twice: with the ops of PLAIN as torch's own, one kernel an operation, which is what ran before these ops had
kernels, and with the kernels. Its parts are the student's forward with a gradient, its forward without one (ECD's target), the
teacher, the loss, backward and optimizer. PREDICTED times as in launches.py; float32 products at the rate of the stage's
precision. `ratio`: the whole step over its products alone, matrix products, convolutions and attention, at those same rates.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from cmt_kernels.dual import value
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.harness.results_file import about, write_json
from bench.training import unets
from bench.training.launch_trace import Sizes, Trace
from bench.training.launches import MEASURED, Step, as_on_a_gpu, rows_of
from cmt_fast.cost import hardware
from cmt_fast.cost.hardware import Card
from cmt_fast.engine import LocalEngine
from cmt_fast.objectives import OBJECTIVES, LossContext

TARGET = MEASURED / "predicted" / "launches-edm2.json"
PLAIN = ("mp_cat", "mp_silu", "mp_sum", "pixel_norm", "unit_weight")
PRODUCTS = ("matmul", "convolution", "attention", "attention_backward")
PARTS = ("forward", "target", "teacher", "loss", "backward", "optimizer")


class UnetStep(Step):
    """One training step on fake tensors."""

    def __init__(self, objective: str, m: unets.Unet) -> None:
        run = unets.run_of(m)
        self.stage, self.m = unets.stage_of(run, objective, m), m
        net = unets.network(run, m)
        net.to = lambda device: net  # torch cannot move fake parameters, and they are where they should be
        self.engine = LocalEngine(net, self.stage, torch.device("cpu"), lends=True)  # as on a GPU
        self.sizes = Sizes.of(net, m.batch, 0, None)
        self.drawn = unets.rows(m, objective)
        self.teacher = unets.teacher(run, m) if OBJECTIVES[self.stage.objective.kind].teacher else None
        self.world = unets.context(run, m, objective, None)

    def context(self, trace: Trace) -> LossContext:
        if self.teacher is None:
            return self.world

        def taught(*arguments: Any) -> Any:
            trace.part = "teacher"
            with torch.no_grad():
                y = self.teacher(*arguments)
            trace.part = "loss"
            return value(y)

        return self.world._replace(teacher=taught)


def count(objective: str, m: unets.Unet, plain: tuple[str, ...] = ()) -> tuple[Trace, str]:
    """The launches of one step, and its stage's precision."""
    with FakeTensorMode():
        step = UnetStep(objective, m)
        trace = Trace(step.sizes)
        with as_on_a_gpu(trace, plain), trace:
            step(trace)
    return trace, step.stage.precision


def result(objective: str, m: unets.Unet, card: Card, plain: tuple[str, ...]) -> dict[str, Any]:
    """What is written of one step."""
    trace, precision = count(objective, m, plain)
    rows = rows_of(trace.launches, card, "tf32" if precision == "tf32" else "fp32")
    total = lambda key, keep=lambda row: True: sum(row[key] for row in rows if keep(row))
    is_product = lambda row: row["kind"] in PRODUCTS
    wide = lambda row: is_product(row) and precision == "bf16" and row["dtypes"].startswith("float32")
    step = {"objective": objective, "model": m.name, "batch": m.batch, "precision": precision}
    step |= {"kernels": "torch" if plain else "ours", "launches": total("launches"), "bytes": total("bytes")}
    step |= {"flops": total("flops"), "predicted_gpu_ms": total("predicted_ms")}
    step |= {"products_ms": total("predicted_ms", is_product), "distance_products_ms": total("predicted_ms", wide)}
    step["ratio"] = step["predicted_gpu_ms"] / step["products_ms"]
    parts = {part: [r for r in rows if r["part"] == part] for part in PARTS}
    step["parts_ms"] = {part: sum(r["predicted_ms"] for r in own) for part, own in parts.items() if own}
    return step | {"rows": rows}


def show(step: dict[str, Any], most: int = 25) -> None:
    """A line of totals, and the kinds that take longest."""
    print(
        f"\n{step['objective']} {step['model']} batch {step['batch']} {step['precision']}, {step['kernels']}: "
        f"{step['launches']:,} launches, {step['bytes'] * 1e-9:.0f} GB, {step['flops'] * 1e-12:.0f} TFLOP; PREDICTED GPU "
        f"{step['predicted_gpu_ms']:.0f} ms at least, of which products {step['products_ms']:.0f}: {step['ratio']:.2f} times"
    )
    print("  " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in step["parts_ms"].items()))
    for row in sorted(step["rows"], key=lambda row: -row["predicted_ms"])[:most]:
        name = f"{row['part']} {row['op']} of {row['what']}, {row['dtypes']}"
        print(f"  {name:76}{row['launches']:6}{row['bytes'] * 1e-9:9.2f} GB{row['predicted_ms']:9.2f} ms")


def run(arguments: argparse.Namespace) -> int:
    """Print both counts of each step, write the JSON."""
    try:
        models = [unets.unet(name, arguments.batch) for name in arguments.model.split(",")]
    except ValueError as error:
        raise SystemExit(f"launches: {error}") from None
    asked = arguments.objective or list(unets.STAGES)
    if wrong := [name for name in asked if name not in unets.STAGES]:
        raise SystemExit(
            f"launches: --objective: {wrong[0]} is no stage of an EDM2; valid are {', '.join(unets.STAGES)}"
        )
    card, steps = hardware.card(arguments.card, MEASURED), []
    for m, objective, plain in itertools.product(models, asked, (PLAIN, ())):
        steps.append(result(objective, m, card, plain))
        show(steps[-1])
    said = about("cpu")
    ceilings = {"gb_s": card.copy * 1e-9, **{f"{p}_gflop_s": rate * 1e-9 for p, rate in card.matmul.items()}}
    known = {"predicted": True, **{key: said[key] for key in ("torch", "commit", "date")}, "card": card.name}
    target = arguments.json or TARGET
    write_json(target, known | {"ceilings": ceilings | {"measured": card.measured}, "steps": steps})
    print("written to", target)
    return 0
