"""`python -m bench gallery [RECIPE ...]`: docs/gallery.md, of runs that stand in a folder or are trained here and now.

A recipe's run is DIR/RECIPE, or DIR/RECIPE-SEED as `bench seeds` leaves them, the lowest seed first. Where there is none,
`cmt train` makes it; one that is unfinished goes on. Of each the command, the minutes by its own clock, the machine, the
figures and a picture are written: real images, the teacher and every stage from the same noise, class by class. No word or
number of a recipe's part of the page is typed by hand.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiments import seeds
from bench.harness import results_file, tables
from bench.harness.pages import gallery
from cmt_fast.config import fingerprint, loading
from cmt_fast.data.datasets import in_memory
from cmt_fast.render import grids
from cmt_fast.run import standing
from cmt_fast.run.folder import about_run, stored_run
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint

RECIPES = ("digits", "digits-mf", "photos", "gmm")
PAGE = Path("docs/gallery.md")
COLUMNS, POINTS = 10, 1500  # of a picture of images at most, and of one of points
SEED = 0  # of its noise
ORDER = ("pre", "control", "mid", "post")  # of its rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="*", help=f"default {', '.join(RECIPES)}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are (default: runs)")
    parser.add_argument("--docs", type=Path, default=PAGE.parent, help="where the page and its pictures are")


def run(args: argparse.Namespace) -> int:
    """Train what is missing, draw, write the JSON and the page; 1 where a training failed."""
    for recipe in args.recipe or RECIPES:
        name, (folder, seed) = loading.load(recipe).name, found(recipe, args.runs)
        command = ["train", recipe, *([f"seed={seed}"] if seed else []), "--out", str(folder)]
        if not finished(folder) and subprocess.run([sys.executable, "-m", "cmt_fast", *command]).returncode:
            return 1
        picture = args.docs / gallery.PICTURES / f"{name}.png"
        results_file.write_json(tables.RESULTS / f"{name}-gallery.json", facts(recipe, folder))
        draw(Workspace(stored_run(folder), folder, reading=True), picture)
        print(picture, flush=True)
    file = args.docs / PAGE.name
    file.write_text(tables.filled(file.read_text("utf-8")), "utf-8")
    print(file)
    return 0


def found(recipe: str, runs: Path) -> tuple[Path, int]:
    """The folder and the seed of a recipe's run, which need not be there yet. Raises ValueError where the run that is there
    has other settings.
    """
    name = loading.load(recipe).name
    numbered = {int(m[1]): p for p in runs.glob("*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))}
    folder, seed = runs / name, loading.load(recipe).seed
    if not folder.is_dir() and numbered:
        seed, folder = min(numbered.items())
    if (folder / "run.json").is_file():
        stored = stored_run(folder)
        seed, meant = stored.seed, loading.load(recipe, [f"seed={stored.seed}"])
        if fingerprint.digest(stored) != fingerprint.digest(meant):
            differs = fingerprint.changed(loading.dump(meant), loading.dump(stored))
            raise ValueError(f"--runs: {folder} is not a run of {name} as it stands ({'; '.join(differs[:3])})")
    return folder, seed


def finished(folder: Path) -> bool:
    """Whether every stage of a run is trained."""
    try:
        return all(checkpoint.complete(folder / name) for name in stored_run(folder).stages)
    except ValueError:  # a stage or the whole run is not there
        return False


def facts(recipe: str, folder: Path) -> dict[str, Any]:
    """What the page says of a finished run: a table of one seed, and how to make it."""
    stored = stored_run(folder)
    newest = max(standing.moment(*checkpoint.complete(folder / n)) for n in stored.stages)
    return seeds.facts(stored.name, stored) | {
        "command": f"cmt train {recipe}" + (f" seed={stored.seed}" if stored.seed else ""),
        "device": Workspace(stored, folder, reading=True).device.type,
        "environment": about_run(folder)["environment"],
        "date": datetime.datetime.fromtimestamp(newest, datetime.timezone.utc).date().isoformat(),
        "images": {name: stage.images_nimg for name, stage in stored.stages.items()},
        "seeds": [seeds.figures(folder, stored.seed)],
    }


def draw(work: Workspace, file: Path) -> None:
    """The picture: real images, the teacher, and each stage in one step; a column is one class and one noise."""
    stored, setting = work.run, work.setting.each_class()
    n = min(COLUMNS, work.data.classes or COLUMNS) if len(work.data.shape) == 3 else POINTS
    rows = [("real", real(work, n))]
    drawn = setting.generate(work.network("pre"), stored.sampler.teacher_steps, n, SEED, solver=True)
    rows.append((f"teacher, {stored.sampler.teacher_steps} steps", drawn))
    for name in ORDER:
        if name in stored.stages:
            rows.append((f"{name}, 1 step", setting.generate(work.network(name), 1, n, SEED)))
    grids.grid(rows, file, zoom=max(1, 64 // work.data.shape[-1]))


def real(work: Workspace, n: int) -> Tensor:
    """(n, ...) rows of the data, of the classes that the samples are of, evenly spread over each class' rows."""
    data = in_memory(work.data)
    wanted = work.setting.each_class().labels(torch.arange(n))
    if data.labels is None or wanted is None:
        return data.x[torch.arange(n) * data.n // n]
    places = {int(k): (data.labels == k).nonzero().flatten() for k in wanted.unique()}
    return torch.stack(
        [data.x[of[(2 * k + 1) * len(of) // (2 * n)]] for k, of in enumerate(places[int(w)] for w in wanted)]
    )
