"""docs/gallery.md: what a recipe's run was, how long it took, and its pictures, from bench/results/cpu/RECIPE-gallery.json."""

from __future__ import annotations

import json
from pathlib import Path

from bench.harness.pages.recipe_tables import TITLES

PICTURES = "gallery"  # beside the page


def table(results: Path, recipe: str) -> str:
    """A recipe's part of the page. results: the folder of one device."""
    file = results / f"{recipe}-gallery.json"
    if not file.is_file():
        return f"Not measured yet: `python -m bench gallery {recipe}`.\n\n"
    data = json.loads(file.read_text("utf-8"))
    e, stages = data["environment"], data["stages"]
    seconds = {name: s["train_s"] + s["eval_s"] for name, s in stages.items()}
    device = e["gpu"] if data["device"] == "cuda" else f"{e['cpu']}, {e['threads']} thread{'s' * (e['threads'] > 1)}"
    minutes = ", ".join(f"`{name}` {s / 60:.1f}" for name, s in seconds.items())
    lines = [
        f"![{recipe}: rows of real images, the teacher and every stage from the same noise]({PICTURES}/{recipe}.png)\n",
        f"`{data['command']}`\n",
        f"{sum(seconds.values()) / 60:.1f} minutes with the evaluations on the way ({minutes}); {device}, torch {e['torch']}. "
        f"Run finished {data['finished']}, drawn at commit {data['commit']}.\n",
    ]
    return "\n".join([*lines, *_figures(data), ""])


def _figures(data: dict) -> list[str]:
    """Each row of the picture with its figures."""
    stages, steps = data["stages"], data["steps"]
    keys = [k for k in ("frechet", "accuracy") if any(k in f for s in stages.values() for f in s["few"].values() if f)]
    title = {"frechet": "Fréchet", "accuracy": "accuracy"}
    heads = [f"{title[key]}, {k} step{'s' * (k > 1)}" for k in steps for key in keys]
    lines = [f"| | student images | {' | '.join(heads)} |", "|---|---:|" + "---|" * len(heads)]
    cell = lambda figures, key: "not finite" if figures is None else f"{figures[key]:.2f}"
    teacher = data["teacher"]
    cells = [f"{cell(teacher['figures'], key)} ({teacher['steps']} steps)" for key in keys]
    lines.append(f"| teacher: the ODE solver | 0 | {' | '.join([*cells, *[''] * (len(heads) - len(keys))])} |")
    for name, text in TITLES.items():
        if name in stages:
            few = stages[name]["few"]
            cells = [cell(few[str(k)], key) for k in steps for key in keys]
            lines.append(f"| `{name}`: {text} | {stages[name]['student_images']:,} | {' | '.join(cells)} |")
    about = f"{data['samples']:,} samples, seed {data['seed']}; features `{data['extractor']}`."
    return [*lines, f"\n{about}"]
