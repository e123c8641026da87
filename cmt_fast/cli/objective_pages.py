"""A page per objective, made by `cmt theory --pictures DIR`: equation, picture in the plane, figures. Nothing is typed.

The prose is that of the code: what the loss' docstring and its module's say.
"""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path
from typing import Any

import torch

from cmt_fast import models
from cmt_fast.cli import objectives
from cmt_fast.config.schema import Mlp
from cmt_fast.evaluation import plane
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.render import plane as picture
from cmt_fast.runtime import progress
from cmt_fast.storage import files

WIDTH, DEPTH = 64, 3
SIGN = re.compile(r"([*~|\[\]])")  # of emphasis, strokes, tables and links
TITLE = "# The shelf of objectives"
INTRO = """Every objective of the package at work on a Gaussian mixture in the plane, where the flow map is known: a small network
begins as a diffusion model and learns the objective at once, or after mid-training at equal student images. `map` is the RMS
distance of one-step samples to where the exact ODE takes the same noise, `samples` the sliced Wasserstein distance to fresh
data; a loss over sets of rows promises the second alone. One seed, defaults of every key, exact teachers: what is seen here is
what the objectives do, not how they rank on images ([results](results.md)). Made by `cmt theory --pictures`."""


def write(folder: Path, kinds: list[str], steps: int = plane.STEPS) -> None:
    """KIND.png and KIND.md of each kind in `folder`; the page of all beside it where all are made."""
    worlds: dict[str, Any] = {}
    rows = {}
    for kind in kinds:
        about, begun = objectives.about(kind), time.process_time()
        path = OBJECTIVES[kind].path or "linear"
        with progress.phase(f"{kind} in the plane"):
            world, net = worlds[path] if path in worlds else worlds.setdefault(path, begin(path, steps))
            scene = plane.scene(world, net, objectives.default(kind), steps)
        picture.draw(scene, folder / f"{kind}.png")
        found = {start: learned.curve[-1][1:] for start, learned in scene.learned.items()}
        rows[kind] = about | {"before": world.look(net)[1:], "found": found, "cpu_s": time.process_time() - begun}
        files.write_text(folder / f"{kind}.md", page(kind, rows[kind]))
        progress.say(
            f"{kind}: {', '.join(f'{s} {m:.3g}' for s, (m, _) in found.items())}, {rows[kind]['cpu_s']:.0f} CPU s"
        )
    if set(kinds) == set(OBJECTIVES):
        files.write_text(folder.parent / f"{folder.name}.md", index(folder.name, rows))


def begin(path: str, steps: int) -> tuple[plane.World, torch.nn.Module]:
    """A path's world and its diffusion model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.build(Mlp(width=WIDTH, depth=DEPTH), path, plane.SIGMA_DATA, (2,), 0)
    world = plane.World(path)
    return world, plane.diffusion_model(world, net, min(plane.PRE, 2 * steps))


def page(kind: str, row: dict[str, Any]) -> str:
    """The page of one objective."""
    spec = OBJECTIVES[kind]
    rest = inspect.cleandoc(spec.loss.__doc__ or "").partition("\n\n")[2].replace("Returns (B,).", "").strip()
    module = inspect.getmodule(spec.loss)
    assert module is not None and module.__doc__
    place = "/".join(module.__name__.split(".")) + ".py"
    work, keys = row["work"], ", ".join(f"`{k}` {'null' if v is None else v}" for k, v in row["keys"].items())
    facts = [
        ("paper", row["paper"]),
        ("path", row["path"]),
        ("asks its network for", objectives.ASKS[row["asks"]]),
        ("work, in forwards a row", f"{work['forwards']:.3g} ({objectives.parts(work)})"),
        ("prepared by", row["prepared_by"] or "-"),
        ("keys and defaults", keys or "-"),
        ("recipes", ", ".join(row["recipes"]) or "none"),
    ]
    title = row["title"][:1].upper() + row["title"][1:]
    lines = [f"# {title} (`{kind}`)", "", "```", row["equation"], "```", "", prose(rest), ""]
    lines += [f"![{kind} in the plane]({kind}.png)", "", *errors({kind: row}), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in facts]
    lines += ["", f"## What [{place}](../../{place}) says", "", prose(inspect.cleandoc(module.__doc__))]
    lines += ["", "[All objectives](../objectives.md)"]
    return "\n".join(lines) + "\n"


def prose(text: str) -> str:
    """A docstring as Markdown: indented paragraphs are blocks of code, in the others no sign but a backtick means anything."""
    parts = []
    for part in text.split("\n\n"):
        if all(line.startswith("    ") for line in part.splitlines()):
            parts.append("```\n" + inspect.cleandoc("\n" + part) + "\n```")
        else:
            spans = part.split("`")  # every other one is code
            spans[::2] = [SIGN.sub(r"\\\1", span).replace("<", "&lt;") for span in spans[::2]]
            parts.append("`".join(spans))
    return "\n\n".join(parts)


def index(folder: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page of all."""
    named = {f"[{kind}]({folder}/{kind}.md)": row for kind, row in rows.items()}
    return "\n".join([TITLE, "", INTRO, "", *errors(named)]) + "\n"


def errors(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of what each came to."""
    lines = [
        "| objective | forwards a row | map: diffusion model | from it | from mid-training "
        "| samples: diffusion model | from it | from mid-training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        starts = [row["before"], *(row["found"].get(start) for start in plane.STARTS)]
        cells = [f"{found[k]:.3g}" if found else "-" for k in range(2) for found in starts]
        lines.append(f"| {name} | {row['work']['forwards']:.3g} | {' | '.join(cells)} |")
    return lines
