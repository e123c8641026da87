"""docs/gallery.md: what a recipe's run was, how long it took, and its pictures, from bench/results/cpu/RECIPE-gallery.json."""

from __future__ import annotations

import json
from pathlib import Path

from bench.harness.pages import seed_tables

PICTURES = "gallery"  # beside the page


def table(results: Path, recipe: str) -> str:
    """A recipe's part of the page. results: the folder of one device."""
    file = results / f"{recipe}-gallery.json"
    if not file.is_file():
        return f"Not measured yet: `python -m bench gallery {recipe}`.\n\n"
    data = json.loads(file.read_text("utf-8"))
    (run,) = data["seeds"]
    seconds = {name: s["train_s"] + s["eval_s"] for name, s in run["seconds"].items()}
    minutes = ", ".join(f"`{name}` {s / 60:.1f}" for name, s in seconds.items())
    lines = [
        f"![{recipe}: rows of real images, the teacher and every stage from the same noise]({PICTURES}/{recipe}.png)\n",
        f"`{data['command']}`\n",
        f"{sum(seconds.values()) / 60:.1f} minutes with the evaluations on the way ({minutes}).\n",
        seed_tables.table(data),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"
