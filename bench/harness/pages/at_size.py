"""Tables of what long metrics cost, and of what 16 bits resolve of a consistency objective."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

WHAT = {
    "write": "writing the rows",
    "report": "`cmt report --no-judge`",
    "start": "the start of a stage that goes on",
    "watch": "`cmt watch`, the first look",
    "next": "`cmt watch`, every other look",
    "runs": "`cmt runs ls`",
}


def metrics(results: Path) -> str:
    """CPU seconds and peak memory of who writes and who reads a long metrics.jsonl, before and after."""
    data = json.loads((results / "metrics.json").read_text("utf-8"))
    found = {(row["tree"], row["what"]): row for row in data["rows"]}
    trees = [tree for tree in ("before", "after") if (tree, "report") in found]
    head = [f"{tree} ({found[tree, 'report']['commit']}): {x}" for tree in trees for x in ("CPU s", "peak MB")]
    lines = [f"| {data['metric_rows']:,} rows | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for what, title in WHAT.items():
        cells = []
        for tree in trees:
            row = found.get((tree, "watch" if what == "next" else what), {})
            seconds = row.get("next_look_s") if what == "next" else row.get("log_s", row.get("cpu_s"))
            memory = "" if what == "next" or not row else f"{row['peak_mb']:,.0f}"
            cells += ["" if seconds is None else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}", memory]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    sizes = ", ".join(f"{found[tree, 'write']['bytes_a_row']:.0f} bytes a row {tree}" for tree in trees)
    return "\n".join(lines) + f"\n\n{sizes}. {_made(data)}\n"


def rounding(results: Path) -> str:
    """Of each recipe: what the rule finds by q, the bias of the gradient, and figures of post-training by precision."""
    data = json.loads((results / "rounding.json").read_text("utf-8"))
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        parts.setdefault(row["part"], []).append(row)
    lines = [
        "| closed form, step | " + " | ".join(f"{p}: ratio, median (range)" for p in ("bf16", "fp16")) + " |",
        "|---|---|---|",
    ]
    steps: dict[float, dict[str, list[float]]] = {}
    for row in parts["closed form"]:
        steps.setdefault(row["step"], {})[row["precision"]] = row["ratio"]
    for step, by in steps.items():
        cells = [f"{m:.2g} ({low:.2g} to {high:.2g})" for low, m, high in (by[p] for p in ("bf16", "fp16"))]
        lines.append(f"| t/{1 / step:.0f} | {' | '.join(cells)} |")
    if rows := parts.get("gradients"):
        lines += [
            "",
            "| network, q | precision | ratio, median (range) | rows in fp32 | gradient's bias, noise: no rule | by the rule |",
        ]
        lines.append("|---|---|---|---|---|---|")
    for row in rows or []:
        low, m, high = row.get("ratio", [0.0] * 3)
        ratio = f"{m:.2g} ({low:.2g} to {high:.2g})" if "ratio" in row else "refused"
        pair = lambda key, row=row: f"{row[key]['bias']:.1%}, {row[key]['noise']:.1%}" if key in row else ""
        wide = f"{row['wide']:.0%}" if "wide" in row else ""
        name = f"{row['recipe']}, {row['q']}"
        lines.append(
            f"| {name} | {row['precision']} | {ratio} | {wide} | {pair('without the rule')} | {pair('by the rule')} |"
        )
    lines += ["", *_training(parts.get("training", []))]
    return (
        "\n".join(lines)
        + f"\n\nA share of {data['short']:g} of each stage's images; bf16 {data['products']}. {_made(data)}\n"
    )


def _training(rows: list[dict[str, Any]]) -> list[str]:
    """Fréchet distances of post-training, all seeds of a cell."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    has = lambda row: {r["precision"] for r in rows if (r["recipe"], r["seed"]) == (row["recipe"], row["seed"])}
    every = set().union(*map(has, rows))
    for row in rows:
        if has(row) == every:  # a bench that was stopped has seeds in some precisions alone
            cells.setdefault((row["recipe"], row["precision"]), []).append(row)
    lines = [
        "| post-training | precision | last loss | Fréchet, 1 step | Fréchet, 2 steps | skipped |",
        "|---|---|---|---|---|---|",
    ]
    for (recipe, precision), found in cells.items():
        loss = statistics.fmean(row["loss"] for row in found)
        distance = lambda k, found=found: " / ".join(f"{row['frechet'][k]:.3g}" for row in found)
        skipped = " / ".join(str(row["skipped"]) for row in found) if found[0]["skipped"] is not None else ""
        lines.append(f"| {recipe} | {precision} | {loss:.4g} | {distance('1')} | {distance('2')} | {skipped} |")
    return lines if cells else []


def _made(data: dict[str, Any]) -> str:
    return f"{data['device']}, {data['threads']} threads, torch {data['torch']}; commit {data['commit']}, {data['date'][:10]}."
