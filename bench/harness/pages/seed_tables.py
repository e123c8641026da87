"""Figures of a recipe's runs: the tables of docs/results.md and the README over seeds, of docs/gallery.md of one run, and what
contradicts them. Each cell shows every seed, in order; nothing is averaged away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TITLES = {
    "pre": "the pre-trained model as it is",
    "mid": "mid-training",
    "post": "mid- and post-training",
    "control": "post-training only",
}
MEASURES = {"frechet": "Fréchet", "frechet_2": "second space", "accuracy": "accuracy"}
DISTANCES = ("frechet", "frechet_2")

Seeds = list[dict[str, Any]]


def full(results: Path, recipe: str) -> str:
    """Every measure of every stage, the floor and the teacher; what contradicts it. results: the folder of one device."""
    file = results / f"{recipe}-seeds.json"
    if not file.is_file():
        return f"Not measured yet: `python -m bench seeds {recipe}`.\n\n"
    data = json.loads(file.read_text("utf-8"))
    wall = [sum(s["train_s"] + s["eval_s"] for s in row["seconds"].values()) for row in data["seeds"]]
    return table(data, tuple(MEASURES), f"all four stages in {' / '.join(f'{s:.0f}' for s in wall)} s")


def short(results: Path, recipe: str) -> str:
    """The distances alone."""
    return table(json.loads((results / f"{recipe}-seeds.json").read_text("utf-8")), DISTANCES)


def table(data: dict[str, Any], measures: tuple[str, ...] = tuple(MEASURES), more: str = "") -> str:
    """Real images, the teacher, every stage and the ratios. data: as `bench seeds` writes it; measures: those that were taken."""
    seeds, steps = data["seeds"], list(data["seeds"][0]["stages"]["post"])
    keys = [(k, m) for k in steps for m in measures if all(m in (s["stages"]["post"][k] or ()) for s in seeds)]
    heads = [f"{MEASURES[m]}, {k} step{'s' * (k != '1')}" for k, m in keys]
    lines = [f"| {data['recipe']} | student images | {' | '.join(heads)} |", "|---|---:|" + "---|" * len(keys)]
    lines += _real(seeds, keys) + [_teacher(seeds, keys)]
    images = {**data["images"], "pre": 0, "post": data["images"]["mid"] + data["images"]["post"]}
    for name, title in TITLES.items():
        cells = [each(s["stages"][name][k] and s["stages"][name][k][m] for s in seeds) for k, m in keys]
        lines.append(f"| `{name}`: {title} | {images[name]:,} | {' | '.join(cells)} |")
    for other in ("control", "mid"):
        cells = [each(ratios(seeds, other, k, m)) if m in DISTANCES else "" for k, m in keys]
        lines.append(f"| ratio: `post` / `{other}` | {images['post'] / images[other]:.3g} | {' | '.join(cells)} |")
    said = contradictions(seeds)
    return "\n".join([*lines, "", *([" ".join(said), ""] if said else []), _about(data, more)]) + "\n\n"


def _about(data: dict[str, Any], more: str) -> str:
    seeds, e = data["seeds"], data["environment"]
    numbers = ", ".join(str(s["seed"]) for s in seeds)
    parts = [
        f"Seeds {numbers}, in this order" if len(seeds) > 1 else f"Seed {numbers}",
        f"{data['samples']:,} samples",
        f"features `{seeds[0]['extractor']}`"
        + (f", second space `{seeds[0]['second']}`" if "second" in seeds[0] else ""),
        f"{e['cpu']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}",
        *([more] if more else []),
        f"commit {data['commit']}, {data['date']}",
    ]
    return "; ".join(parts) + "."


def each(values: Iterable[float | None]) -> str:
    """All seeds of one cell, to three digits."""
    return " / ".join("not finite" if v is None else f"{v:#.3g}".rstrip(".") for v in values)


def ratios(seeds: Seeds, other: str, k: str, measure: str) -> list[Any]:
    """`post` over another stage in k steps, of each seed; None where either has no figures."""
    pairs = [(s["stages"]["post"][k], s["stages"][other][k]) for s in seeds]
    return [a[measure] / b[measure] if a and b else None for a, b in pairs]


def _real(seeds: Seeds, keys: list[tuple[str, str]]) -> list[str]:
    """The floor: as many real images drawn again, against all of them."""
    if not all(s.get("floor") for s in seeds):
        return []
    return [
        f"| real images, drawn again: the floor | | {' | '.join(each(s['floor'][m] for s in seeds) for _, m in keys)} |"
    ]


def _teacher(seeds: Seeds, keys: list[tuple[str, str]]) -> str:
    (calls,) = seeds[0]["stages"]["teacher"]
    found = [each(s["stages"]["teacher"][calls][m] for s in seeds) if k == keys[0][0] else "" for k, m in keys]
    return f"| teacher: the ODE solver, {calls} steps | 0 | {' | '.join(found)} |"


def contradictions(seeds: Seeds) -> list[str]:
    """Whether other measures say of `post` and `control` what the first distance says, in sentences; none if none was taken."""
    taken = lambda k: all("frechet_2" in (s["stages"][name][k] or ()) for s in seeds for name in ("post", "control"))
    steps = [k for k in seeds[0]["stages"]["post"] if taken(k)]
    spaces = [text for k in steps if (text := _spaces(seeds, k))]
    if steps and not spaces:
        every = " at every seed" * (len(seeds) > 1)
        spaces = [
            f"In {' and '.join(steps)} step{'s' * (steps != ['1'])} `post` is nearer than `control` in both spaces{every}."
        ]
    return spaces + [text for k in steps if (text := _sharpness(seeds, k))]


def _spaces(seeds: Seeds, k: str) -> str:
    """Empty where both spaces have `post` nearer at every seed."""
    where, pairs = f"{k} step{'s' * (k != '1')}", list(zip(*(ratios(seeds, "control", k, m) for m in DISTANCES)))
    apart = _at(seeds, ((a < 1) != (b < 1) for a, b in pairs))
    worse = _at(seeds, (a >= 1 and b >= 1 for a, b in pairs))
    return " ".join(
        [f"**The two spaces disagree in {where}** on whether `post` or `control` is nearer, at {apart}."] * bool(apart)
        + [f"In {where} `control` is nearer in both spaces at {worse}."] * bool(worse)
    )


def _sharpness(seeds: Seeds, k: str) -> str:
    """Empty where `post` is at every seed at least as near to the sharpness of real images as `control`."""
    if not all("sharpness" in (s.get("floor") or ()) for s in seeds):  # points have none
        return ""
    post, control = ([s["stages"][name][k]["sharpness"] for s in seeds] for name in ("post", "control"))
    real = [s["floor"]["sharpness"] for s in seeds]
    less = _at(seeds, (abs(p - r) > abs(c - r) for p, c, r in zip(post, control, real)))
    energy = (
        f"the share of high-frequency energy is {each(post)}, {each(control)} in `control`, {each(real)} in real images"
    )
    where = f"In {k} step{'s' * (k != '1')}"
    return (
        f"{where} `post` is further from the sharpness of real images than `control` at {less}: {energy}."
        if less
        else ""
    )


def _at(seeds: Seeds, chosen: Iterable[bool]) -> str:
    """`seeds 0, 2`: those that are chosen; empty for none."""
    numbers = [str(s["seed"]) for s, yes in zip(seeds, chosen) if yes]
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""
