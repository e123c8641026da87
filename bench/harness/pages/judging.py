"""The table of what judging costs at the size of published figures, as it was and as it is."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = {
    "moments": "moments of all samples and of 10 groups, in batches of 64",
    "frechet": "Fréchet distance of a set, and without each group",
    "neighbours": "precision and recall against as many rows",
    "samples": "the samples as an `.npz`, 64 x 64 pixels in bytes",
}


def table(results: Path) -> str:
    """Seconds of the processor and the peak of memory beside what both ways are given; what kills changed."""
    data = json.loads((results / "judging.json").read_text("utf-8"))
    found = {(r["part"], r["way"], r["ranks"]): r for r in data["rows"]}
    first = found["moments", "after", 1]
    head = f"{first['n']:,} samples of {first['features']:,} features"
    lines = [f"| {head} | CPU s before | now | GB before | now |", "|---|---:|---:|---:|---:|"]
    for part, text in ROWS.items():
        before = found[part, "before", 1]
        for (_, _, ranks), row in sorted((k, r) for k, r in found.items() if k[:2] == (part, "after")):
            shared = f", each of {ranks} processes" if ranks > 1 else ""
            cells = [f"{r['cpu_s']:.1f}" for r in (before, row)]
            cells += [f"{(r['peak_bytes'] - r['held_bytes']) / 1e9:.2f}" for r in (before, row)]
            lines.append(f"| {text}{shared} | {' | '.join(cells)} |")
    lines.append("")
    for name, k in data["killed"].items():
        command, _, form = name.partition(", ")
        times = f"{k['kills']} time{'s' * (k['kills'] != 1)}"
        same = "equal to the last byte" if k["equal"] else "NOT equal"
        what = f"`cmt {command}`{f' to {form}' * bool(form)} of {k['drawn_alone']:,} samples, killed {times}"
        lines.append(f"- {what}: {same}; {k['drawn']:,} drawn in all.")
    lines.append(
        f"\n{data['device']}, {data['threads']} thread, torch {data['torch']}; commit {data['commit']}, {data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"
