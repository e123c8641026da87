"""Tables of `python -m bench plan`: what fits a budget, the way to one, sources, activations counted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmt_fast.engine.sharding import gb


def table(results: Path, which: str) -> str:
    """The table of this name: plans (""), levers, sources or activations."""
    data = json.loads((results.parent / "predicted" / "plans.json").read_text("utf-8"))
    lines = {"": plans, "levers": levers, "sources": sources, "activations": activations}[which](data)
    return "\n".join(lines) + f"\n\n`python -m bench plan`; commit {data['commit']}, {data['date']}.\n\n"


def plans(data: dict[str, Any]) -> list[str]:
    """A row for each stage of each plan."""
    heads = ["recipe, machine, budget", "stage", "of its images", "rows of a step", "hours, GPU-hours (predicted)",
             "memory of a process", "disk", "a step's time goes to", "time is"]  # fmt: skip
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for p in data["plans"]:
        name = f"{p['recipe']}, {p['gpus']} x {p['gpu']}, {p['budget_hours']:g} h"
        for stage, s in p["stages"].items():
            rows = f"{s['batch']} = {p['gpus']} x {s['passes']} x {s['micro_batch']}"
            held = f"{gb(int(s['memory']['bytes']))} of {gb(int(s['memory']['limit']))}"
            share = f"{s['images'] / s['of_images']:.1%} of {s['of_images'] / 1e6:.4g} M"
            out.append(
                f"| {name} | {stage} | {share} | {rows} | {s['hours']:.3g}, {s['gpu_hours']:.4g} | {held} | "
                f"{gb(s['disk']['checkpoints'])} | {s['limits']} | {s['mark']} |"
            )
            name = ""
    return out


def levers(data: dict[str, Any]) -> list[str]:
    """From the first plan's recipe to its budget."""
    p = data["plans"][0]
    head = f"{p['recipe']} on {p['gpus']} x {p['gpu']}: to {p['gpus'] * p['budget_hours']:g} GPU-hours for all images"
    out = [f"| {head} | GPU-hours, PREDICTED | lever is | why |", "|---|---|---|---|"]
    for line in p["levers"]:
        hours = "" if line["gpu_hours"] is None else f"{line['gpu_hours']:.1f}"
        out.append(f"| {line['what']} | {hours} | {line['state']} | {line['why']} |")
    return out


def sources(data: dict[str, Any]) -> list[str]:
    """Each kind of machine's figures and where they are from."""
    out, seen = ["| machine | figure | value | source |", "|---|---|---|---|"], set()
    for p in data["plans"]:
        for row in p["sources"]:
            cells = (p["gpu"], row["what"], row["value"], row["source"])
            if ":" in row["what"]:
                cells = (f"{p['gpu']}, {p['recipe']}", *cells[1:])
            if cells not in seen:
                seen.add(cells)
                out.append(f"| {' | '.join(cells)} |")
    return out


def activations(data: dict[str, Any]) -> list[str]:
    """What steps were measured to save, beside the count."""
    out = [
        "| step | saved for backward, measured GB | counted GB | measured / counted | from |",
        "|---|---|---|---|---|",
    ]
    for r in data["activations"]:
        out.append(f"| {r['step']} | {r['saved_gb']:.1f} | {r['counted_gb']:.1f} | {r['ratio']:.2f} | {r['source']} |")
    return out
