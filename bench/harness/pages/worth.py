"""The table of docs/ideas.md that shows what a budget of forwards chooses in the known world, from `python -m bench worth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RULES = {"bound": "the bound", "error": "without a budget", "theorem": "plain sum"}


def table(results: Path) -> str:
    """A row for each student and budget: what each rule takes, and its bias over that of the best candidate."""
    data = json.loads((results / "gmm-worth.json").read_text("utf-8"))
    lines = ["| student | forwards | best | " + " | ".join(RULES.values()) + " | at random | ranks |", "|---" * 8 + "|"]
    for student, budgets in data["students"].items():
        lines += [_row(student, found) for found in budgets]
    rows = [row for budgets in data["students"].values() for found in budgets for row in found["candidates"].values()]
    loose = [row["most"] / row["bias"] for row in rows]
    lines.append(
        f"\n{len(rows)} students, each a candidate at a budget. `x` is the bias over that of the best candidate, ranks are "
        f"Spearman's correlation of {', '.join(RULES.values())} with the bias. The bias is below its bound 4 lambda_max(E J J^T) E|e|^2 in "
        f"{sum(value > 1 for value in loose)} of them, by {min(loose):.3g} to {max(loose):.3g} times. {data['seeds']} seeds of "
        f"training; {data['cpu_s']:.0f} CPU seconds; commit {data['commit']}, {data['date']}.\n"
    )
    return "\n".join(lines) + "\n"


def _row(student: str, found: dict[str, Any]) -> str:
    names, rows = found["rules"], found["candidates"]
    least = rows[names["best"]]["bias"]
    cells = [f"{names[rule]}, x{rows[names[rule]]['bias'] / least:.3g}" for rule in RULES]
    right = " / ".join(f"{found['correlation'][rule]:.2f}" for rule in RULES)
    return f"| {student} | {found['budget']:,} | {names['best']} | {' | '.join(cells)} | x{found['random'] / least:.3g} | {right} |"
