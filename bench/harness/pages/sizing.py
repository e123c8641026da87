"""The table of what a rank holds, measured beside the sizing, and the largest published network counted up."""

from __future__ import annotations

import json
from pathlib import Path

CASES = {"plain": "a DiT", "teacher": "with a teacher, at stage 3 sharded", "edm2": "an EDM2"}
PHASES = ("start", "step", "save", "evaluation")


def table(results: Path) -> str:
    """A row a number of processes and engine: the peak of each phase in copies of the weights, the sizing's in brackets."""
    data = json.loads((results / "ranks.json").read_text())
    lines = []
    for case, title in CASES.items():
        lines += [f"| {title} | {' | '.join(PHASES)} |", "|---" + "|---:" * len(PHASES) + "|"]
        for name, row in data[case].items():
            engine, _, ranks = name.partition("-")
            both = (f"{row['measured'][p]:.2f} ({row['sizing'][p]:.2f})" for p in PHASES)
            lines.append(f"| {engine}, {ranks} process{'es' * (ranks != '1')} | {' | '.join(both)} |")
        lines.append("")
    pairs = [(r["sizing"][p], r["measured"][p]) for c in CASES for r in data[c].values() for p in PHASES]
    begun = {row["sums"]["start"] for row in data["plain"].values()}
    counted = data["counted"]["EDM2-XXL"]["gb"]
    sizes = ", ".join(f"{name} {counted[name]['step']} GB" for name in ("local-8", "zero1-8", "zero2-8", "zero3-8"))
    lines.append(
        f"The sizing is off by at most {max(abs(a / b - 1) for a, b in pairs):.0%}. First weights: "
        f"{'the same bits in every row' if len(begun) == 1 else 'NOT the same in all rows'}. An EDM2-XXL's step on eight "
        f"processes, counted, without activations: {sizes}. Commit {data['commit']}, {data['date'][:10]}; several sittings.\n"
    )
    return "\n".join(lines) + "\n"
