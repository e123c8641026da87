"""`python -m bench precisions RECIPE`: a recipe in fp32, bf16 and bf16-stream, over several seeds: losses and figures.

Every stage of a run is in the precision, so what one stage loses the next begins with. A CPU without bf16 instructions
multiplies bf16 matrices far slower than fp32 ones (12 times on AVX2); there, and nowhere else, the factors, which are bf16
numbers, are multiplied and added up in fp32 and the result is rounded to bf16: what a tensor core does. Networks are judged
in fp32. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.experiments.seeds import facts
from cmt_fast.config import loading
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import metrics_log
from cmt_fast.train import loop

PRECISIONS = ("fp32", "bf16", "bf16-stream")
PARTS = 8  # of a stage: a loss curve is the mean of each
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class WideProducts(TorchDispatchMode):
    """Products of bf16 factors added up in fp32 and rounded once, on a CPU that has no instruction for them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in args):
            return function(*args, **kwargs)
        wide = tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, args)
        out = function(*wide, **kwargs)
        if not isinstance(out, tuple):
            return out.bfloat16()
        rounded = [
            x.bfloat16() if isinstance(x, Tensor) and x.ndim == 4 else x for x in out
        ]  # logsumexp (B, H, T) stays
        return tuple(rounded)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe")
    p.add_argument("--seeds", default="0")
    p.add_argument("--precisions", default=",".join(PRECISIONS))
    p.add_argument("--stages", default="pre,mid,post")
    p.add_argument("--out", type=Path, default=Path("runs/precisions"))
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/RECIPE-precisions.json")


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by an instruction of its own."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def run(args: argparse.Namespace) -> int:
    """Train, judge, print the table, write the JSON."""
    names, rows = args.stages.split(","), []
    for seed in map(int, args.seeds.split(",")):
        for precision in args.precisions.split(","):
            rows.append(measure(args.recipe, seed, precision, names, args.out / f"{args.recipe}-{precision}-{seed}"))
            print(line(rows[-1]), flush=True)
    about = facts(args.recipe, loading.load(args.recipe)) | {
        "products": "bf16 by the processor" if has_bf16() else "bf16 factors in fp32, rounded to bf16",
        "rows": rows,
    }
    path = args.json or Path("bench/results/cpu") / f"{args.recipe}-precisions.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path)
    return 0


def measure(recipe: str, seed: int, precision: str, names: list[str], out: Path) -> dict[str, Any]:
    """One seed in one precision: loss curves and figures of its stages."""
    overrides = [f"{name}.precision={precision}" for name in names] + [f"seed={seed}"]
    work = Workspace(loading.load(recipe, overrides), out)
    with contextlib.nullcontext() if has_bf16() or precision == "fp32" else WideProducts():
        loop.train(work, names)
    row: dict[str, Any] = {"seed": seed, "precision": precision, "steps": {}, "losses": {}, "figures": {}}
    steps, n = work.run.eval.steps, work.run.eval.n
    for name in names:
        losses = [r["loss"] for r in metrics_log.read(out / name / metrics_log.METRICS) if r["kind"] == "train"]
        every = -(-len(losses) // PARTS)
        row["steps"][name] = work.stage(name).schedule.total
        row["losses"][name] = [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)]
        row["figures"][name] = work.judging.evaluate(work.network(name), steps, n)
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text: of each stage its last losses, and the Fréchet distance of one and two steps."""
    out = [f"seed {row['seed']} {row['precision']:>12}"]
    for name, losses in row["losses"].items():
        distances = " ".join(f"{f['frechet']:.3f}" for f in row["figures"][name].values())
        out.append(f"{name} ({row['steps'][name]} steps) loss {losses[-1]:.4g}, distance {distances}")
    return "; ".join(out)
