"""Tables of docs/multi-node.md: what a run on two nodes lives through, and what 64 ranks move."""

from __future__ import annotations

import json
from pathlib import Path

from cmt_fast.cost import nodes


def lives(results: Path) -> str:
    """Each life of the run of `python -m bench nodes`, beside the one that was never stopped."""
    data = json.loads((results / "nodes.json").read_text())
    lines = [
        "| a run of two nodes | ranks of its jobs | went on at step | largest difference |",
        "|---|---|---|---:|",
    ]
    for row in data["rows"]:
        ranks = ", ".join(str(job["nodes"] * job["each"]) for job in row["jobs"])
        steps, off = ", ".join(map(str, row["resumed_at"])) or "-", row["relative_difference"]
        lines.append(f"| {row['life']} | {ranks} | {steps} | {f'{off:.1e}' if off else '0, all bits'} |")
    lines.append(
        f"\n{data['steps']} steps of the stage `pre` of docker/mini.yaml, batch {data['batch']}, `engine=local` on gloo, "
        f"differences of weights over the largest of a tensor; {data['device']}, torch {data['torch']}; commit {data['commit']}, "
        f"{data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"


def ranks() -> str:
    """As cost/nodes.py counts."""
    return nodes.table()
