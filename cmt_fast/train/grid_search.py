"""Search the settings of one stage over a grid, and keep the record.

The stages before it are trained once in OUT/base; each trial is a run of its own that takes them from there. A
trial's figures are those of its final EMA. Nothing is chosen here: the table is sorted, a person (or a recipe) picks.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime.machine import environment
from cmt_fast.runtime.progress import say
from cmt_fast.storage import files
from cmt_fast.train import loop


def trials(grids: list[str]) -> list[list[str]]:
    """Override lists: within one grid "a=1,2 b=3,4" every combination, several grids one after the other.

    A value may itself hold commas inside [] or {}. Raises ConfigError for a grid that is not of this form.
    """
    out: list[list[str]] = []
    for text in grids:
        axes = []
        for axis in text.split():
            key, equals, values = axis.partition("=")
            if not equals or not values:
                raise ConfigError(f"--grid: {axis!r} is not of the form a.b=v1,v2")
            axes.append([f"{key}={value}" for value in _split(values)])
        out += [list(choice) for choice in itertools.product(*axes)]
    return out


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def run(recipe: str, stage: str, overrides: list[str], grids: list[str], out: Path, record: Path | None) -> None:
    """Train and judge every trial; print the table and write it to `record` as JSON. Finished trials are kept."""
    base = Workspace(loading.load(recipe, overrides), out / "base")
    if stage not in base.run.stages:
        raise ConfigError(f"STAGE: {stage!r} is not in this recipe; it has {', '.join(base.run.stages)}")
    tried = trials(grids)
    for choice in tried:  # every trial must make sense before the first is trained
        Workspace(loading.load(recipe, [*overrides, *choice]), out)
    loop.train(base, base.run.ancestors(stage))
    rows = []
    for number, choice in enumerate(tried):
        work = Workspace(loading.load(recipe, [*overrides, *choice]), out / f"trial-{number:03d}", base.folder)
        say(f"trial {number + 1}/{len(tried)}: {' '.join(choice)}")
        row: dict = {"set": choice, "digest": fingerprint.digest(work.run)}
        try:
            loop.train(work, [stage])
            row |= {
                "steps": work.judging.evaluate(
                    work.network(stage, together=True), work.run.eval.steps, work.run.eval.n
                ),
                "extractor": work.judging.judge.name,
            }
        except FloatingPointError as error:
            row["failed"] = str(error)
        rows.append(row)
        _write(record or out / "search.json", recipe, stage, overrides, grids, base, rows)
    _show(rows)


def _write(
    path: Path, recipe: str, stage: str, overrides: list[str], grids: list[str], base: Workspace, rows: list
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "recipe": recipe,
        "stage": stage,
        "overrides": overrides,
        "grids": grids,
        "seed": base.run.seed,
        "images": {name: own.images_nimg for name, own in base.run.stages.items()},
        "samples": base.run.eval.n,
        "environment": environment(),
        "trials": rows,
    }
    files.write_text(path, json.dumps(about, indent=1) + "\n")


def _show(rows: list[dict]) -> None:
    table = Table(title="sorted by the sum of log distances")
    table.add_column("settings")
    done = [r for r in rows if "steps" in r]
    for k in done[0]["steps"] if done else ():
        table.add_column(f"Fréchet, {k}", justify="right")
        table.add_column(f"accuracy, {k}", justify="right")
    product = lambda row: _product(r["frechet"] for r in row["steps"].values())
    for row in sorted(done, key=product):
        cells = [
            c for r in row["steps"].values() for c in (f"{r['frechet']:.3f}", f"{r.get('accuracy', float('nan')):.3f}")
        ]
        table.add_row(" ".join(row["set"]), *cells)
    for row in rows:
        if "failed" in row:
            table.add_row(" ".join(row["set"]), row["failed"])
    Console(width=140).print(table)


def _product(values) -> float:
    out = 1.0
    for v in values:
        out *= v
    return out
