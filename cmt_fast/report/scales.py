"""Figures of one network at several guidance scales: `cmt eval --guidance` keeps them, the report's page shows them.

RUN/<stage>/guidance.json, for others to read:

    {"stage": "post", "ema": ...,         checksum of the weights that all of it is of
     "sets": [{"scale": 2.0, "interval": [0.4, 0.65], "solver": false, "n": ..., "seed": ..., "metric": ..., "extractor": ...,
               "second": ..., "reference": ..., "labels": ...,
               "steps": {"1": {"frechet": ...}}, "intervals": {"1": {"frechet": [low, high]}}}]}

A set that was judged again takes the place of the one before; those of other weights go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmt_fast.evaluation.intervals import Interval
from cmt_fast.render.templates import Group, Section, Table
from cmt_fast.report import verdict
from cmt_fast.report.figures import Names
from cmt_fast.run.standing import Standing
from cmt_fast.runtime.words import DASH
from cmt_fast.storage import files, sound

FILE = "guidance.json"
FIGURES = ("steps", "intervals")


def keep(folder: Path, stage: str, ema: str, sets: Sequence[dict[str, Any]]) -> None:
    """Add sets to those of a stage's folder; nothing where nothing can be written."""
    of = lambda one: {key: value for key, value in one.items() if key not in FIGURES}
    new = [of(one) for one in sets]
    with files.unless_refused():
        try:
            before = read(folder, ema)
        except sound.Unsound as error:
            sound.aside(error.file, error.why)
            before = []
        both = [one for one in before if of(one) not in new] + list(sets)
        files.write_text(folder / FILE, sound.signed({"stage": stage, "ema": ema, "sets": both}))


def read(folder: Path, ema: str) -> list[dict[str, Any]]:
    """The sets of these weights; none where there is no such file. Raises Unsound for one that is not what was written."""
    try:
        found = sound.read(folder / FILE)
    except FileNotFoundError:
        return []
    sets = found.get("sets")
    if not isinstance(sets, list) or not all(
        isinstance(one, dict) and one.keys() >= {"scale", *FIGURES} for one in sets
    ):
        raise sound.Unsound(folder / FILE, "holds no figures as `cmt eval --guidance` writes them")
    return sets if found.get("ema") == ema else []


def known(folders: Sequence[Path], ema: str) -> list[dict[str, Any]]:
    """Those of the first of these folders that has any; a damaged file is passed over."""
    for folder in folders:
        try:
            if sets := read(folder, ema):
                return sets
        except (OSError, sound.Unsound):
            continue
    return []


def section(stands: dict[str, Standing], names: Names) -> Section:
    """A table for each network that was judged at scales of its own; of none an empty section."""
    tables = []
    for name, s in stands.items():
        sets = known([s.folder], s.ema) if s.ema else []
        if sets:
            tables.append(_table(name, sets, names))
    text = (
        "The same network, noise and labels at each scale (`cmt eval --guidance`): what a network is told in few steps, or by "
        "what the ODE solver is guided. Lower distances are better; what is best in one feature space need not be in the other."
    )
    return Section(
        "At several scales of guidance", [text] if tables else [], [Group([*tables], wide=True)] if tables else []
    )


def _table(name: str, sets: list[dict[str, Any]], names: Names) -> Table:
    steps = sorted({k for one in sets for k in one["steps"]}, key=int)
    columns = [(key, k) for k in steps for key in ("frechet", "frechet_2")]
    heads = [f"{'distance' if key == 'frechet' else 'second'} @{k}" for key, k in columns]
    rows = []
    for one in sorted(sets, key=lambda s: (bool(s.get("solver")), s["scale"], str(s.get("extractor")), s.get("n", 0))):
        at = one.get("interval")
        where = "solver" if one.get("solver") else f"[{at[0]:g}, {at[1]:g}]" if at and one["scale"] != 1 else DASH
        figures = [_cell(one, key, k) for key, k in columns]
        rows.append(
            [f"{one['scale']:g}", where, *figures, f"{one.get('n', 0):,}", str(one.get("seed")), str(one.get("metric"))]
        )
    note = (
        f"@k: in k steps. In brackets: 95 %, over other samples. Second: {names.second or 'the second feature space'}."
    )
    return Table(name, ["scale", "interval", *heads, "samples", "seed", "distance is"], rows, note, left=2)


def _cell(one: dict[str, Any], key: str, k: str) -> str:
    value, ends = one["steps"].get(k, {}).get(key), one["intervals"].get(k, {}).get(key)
    if value is None:
        return DASH
    return verdict.text(Interval(value, *ends) if ends else value)
