"""The table of docs/ideas.md that shows what a budget of forwards chooses in the known world, from `python -m bench worth`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RULES = {"bound": "the bound", "error": "without a budget", "theorem": "plain sum"}
PARTS = {"ends": "a sixteenth with the endpoint's error", "whole": "all of epsilon with the targets'"}


def table(results: Path) -> str:
    """A row for each student and budget: what each rule takes, and its bias over that of the best candidate."""
    data = json.loads((results / "gmm-worth.json").read_text("utf-8"))
    lines = ["| student | forwards | best | " + " | ".join(RULES.values()) + " | at random | ranks |", "|---" * 8 + "|"]
    for student, budgets in data["students"].items():
        lines += [_row(student, found) for found in budgets]
    rows = [row for budgets in data["students"].values() for found in budgets for row in found["candidates"].values()]
    loose = [row["most"] / row["bias"] for row in rows]
    means = ", ".join(f"{name} {_mean(data, rule):.3g}" for rule, name in {**RULES, **PARTS}.items())
    lines.append(
        f"\n{len(rows)} students, each a candidate at a budget. `x` is the bias over that of the best candidate, its geometric "
        f"means: {means}, at random {_mean(data):.3g}. Ranks are Spearman's correlation of {', '.join(RULES.values())} with the "
        f"bias. The bias is below its bound 4 lambda_max(E J J^T) E|e|^2 in {sum(value > 1 for value in loose)} of them, by "
        f"{min(loose):.3g} to {max(loose):.3g} times. {data['seeds']} seeds of training; {data['cpu_s']:.0f} CPU seconds; commit "
        f"{data['commit']}, {data['date']}.\n"
    )
    return "\n".join(lines) + "\n"


def _row(student: str, found: dict[str, Any]) -> str:
    names = found["rules"]
    cells = [f"{names[rule]}, x{_over(found, rule):.3g}" for rule in RULES]
    right = " / ".join(f"{found['correlation'][rule]:.2f}" for rule in RULES)
    return (
        "| "
        + " | ".join([student, f"{found['budget']:,}", names["best"], *cells, f"x{_over(found):.3g}", right])
        + " |"
    )


def _over(found: dict[str, Any], rule: str | None = None) -> float:
    """The bias of what a rule takes, of the mean candidate without one, over that of the best candidate."""
    names, rows = found["rules"], found["candidates"]
    return (rows[names[rule]]["bias"] if rule else found["random"]) / rows[names["best"]]["bias"]


def _mean(data: dict[str, Any], rule: str | None = None) -> float:
    """Its geometric mean over students and budgets."""
    logs = [math.log(_over(found, rule)) for budgets in data["students"].values() for found in budgets]
    return math.exp(sum(logs) / len(logs))
