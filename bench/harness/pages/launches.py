"""The table of what a training step launches on a GPU, before and after: counted without one, times predicted."""

from __future__ import annotations

import json
from pathlib import Path

KINDS = ("cast up", "cast down", "add", "fill", "reduction", "cat")


def table(results: Path) -> str:
    """A row a step and tree: launches of all and of each kind that need not be, bytes, predicted times."""
    folder = results.parent / "predicted"
    before, after = (json.loads((folder / f"launches{end}.json").read_text()) for end in ("-baseline", ""))
    lines = [
        f"| step | tree | launches | {' | '.join(KINDS)} | GB | GPU ms, at least (predicted) | host ms, eager (predicted) |",
        "|---" * (6 + len(KINDS)) + "|",
    ]
    for data in (before, after):
        for step in data["steps"]:
            of = lambda kind, step=step: sum(r["launches"] for r in step["rows"] if r["kind"] == kind)
            host = step["predicted_host_ms"]
            lines.append(
                f"| {step['objective']} {step['model']} B{step['batch']} {step['precision']} | {data['commit']} "
                f"| {step['launches']:,} | {' | '.join(f'{of(kind):,}' for kind in KINDS)} | {step['bytes'] * 1e-9:.0f} "
                f"| {step['predicted_gpu_ms']:.0f} | {f'{host:.0f}' if host else ''} |"
            )
    rates = after["ceilings"]
    lines.append(
        f"\nPredicted, not measured: bytes at {rates['gb_s']:,.0f} GB/s or products at {rates['gflop_s'] * 1e-3:,.0f} TFLOP/s, "
        f"whichever takes longer, of {after['card'].upper()}; the host's at the microseconds a launch of the steps that were "
        f"measured on the first tree, without a CUDA graph. {after['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"


def unets(results: Path) -> str:
    """A row a step of an EDM2, before and after its ops had kernels: what products take, and all else, predicted."""
    data = json.loads((results.parent / "predicted" / "launches-edm2.json").read_text())
    lines = [
        "| step | between convolutions | launches | GB | TFLOP | GPU ms, at least (predicted) "
        "| of products alone | of these, the distance's, in fp32 | all / products |",
        "|---" * 9 + "|",
    ]
    for step in data["steps"]:
        how = {"torch": "torch, op by op", "ours": "kernels"}[step["kernels"]]
        lines.append(
            f"| {step['objective']} {step['model']} B{step['batch']} {step['precision']} | {how} | {step['launches']:,} "
            f"| {step['bytes'] * 1e-9:,.0f} | {step['flops'] * 1e-12:.0f} | {step['predicted_gpu_ms']:,.0f} "
            f"| {step['products_ms']:,.0f} | {step['distance_products_ms']:,.0f} | {step['ratio']:.2f} |"
        )
    rates = data["ceilings"]
    tera = {p: rates[f"{p}_gflop_s"] * 1e-3 for p in ("bf16", "tf32", "fp32")}
    lines.append(
        f"\nPREDICTED, not measured: bytes at {rates['gb_s']:,.0f} GB/s or products at {tera['bf16']:,.0f} (bf16), "
        f"{tera['tf32']:,.0f} (TF32), {tera['fp32']:,.0f} (fp32) TFLOP/s, whichever takes longer, of "
        f"{data['card'].upper()}; a convolution reaches less than a matrix product. "
        f"ECD's teacher is of the student's size, without a guide. Commit {data['commit']}, "
        f"{data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"
