"""What a run survives: the rows of docs/safety/*.yaml as docs/safety.md, and the few of them that the README shows.

A file is a list of rows. A row has `promise` (one sentence), `test` (names of test functions; where they are is looked up, so
a test that is renamed or deleted shows here), `figure` and, where that was counted by a bench, `result`: a file below
bench/results, say cpu/kills.json. `{a.b}` in a figure is filled from that file, `{rows.0.n:,}` from its lists too: figures
are never typed. Without a result, `figure` says in words what the test does, and the page says that it is a test.
`readme: true` takes a row into the README, which has room for five.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import yaml

from bench.harness.pages.promises import functions, link

FOLDER, RESULTS = Path("docs/safety"), Path("bench/results")
IN_README = 5
# In this order; a file of another name comes last, under that name.
TITLES = {
    "signals": "Kills, signals and schedulers",
    "look": "Save before you look",
    "disk": "Full disks and other file systems",
    "proofs": "Damage on disk",
    "nan": "Numbers that are not finite",
    "leaks": "One stage after another; memory",
    "hostile": "Hostile and odd input",
    "supply": "What is installed and imported",
}


def table(which: str = "") -> str:
    """A section for each file with the results that its figures are from, or the README's rows where `which` is `readme`.

    Raises ValueError for a row that lacks a part, a test that does not exist, a figure that its result does not hold, and for
    more rows for the README than it has room for.
    """
    found = functions()
    parts = {file: _rows(file) for file in sorted(FOLDER.glob("*.yaml"), key=_place)}
    if which == "readme":
        chosen = [(file, row) for file, rows in parts.items() for row in rows if row.get("readme")]
        if len(chosen) > IN_README:
            raise ValueError(
                f"{FOLDER}: readme: true is in {len(chosen)} rows, and the README has room for {IN_README}"
            )
        rows = [_line(file, row, found).replace("](../", "](") for file, row in chosen]
        return "\n".join(["| promise | figure | test |", "|---|---|---|", *rows]) + "\n\n"
    out: list[str] = []
    for file, rows in parts.items():
        title = TITLES.get(file.stem, file.stem.replace("-", " ").capitalize())
        out += [f"\n## {title}\n", "| promise | figure | test |", "|---|---|---|"]
        out += [_line(file, row, found) for row in rows]
        sources = [_source(name) for name in dict.fromkeys(row["result"] for row in rows if "result" in row)]
        out += ["", *sources] if sources else []
    return "\n".join(out) + "\n\n"


def _place(file: Path) -> tuple[int, str]:
    order = list(TITLES)
    return order.index(file.stem) if file.stem in order else len(order), file.stem


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a list of rows is needed")
    needed = {"promise", "test", "figure"}
    for row in rows:
        if not isinstance(row, dict) or not needed <= set(row) <= needed | {"result", "readme"}:
            raise ValueError(f"{file}: {row} needs promise, test and figure, and may have result and readme")
    return rows


def _line(file: Path, row: dict[str, Any], found: dict[str, list[Path]]) -> str:
    tests = [link(name, found, file) for name in row["test"].replace(",", " ").split()]
    if not tests:
        raise ValueError(f"{file}: {row['promise']!r} names no test")
    return f"| {row['promise']} | {_figure(file, row)} | {', '.join(tests)} |"


def _figure(file: Path, row: dict[str, Any]) -> str:
    """The text with its keys filled from the result, that nobody has measured it, or what is done in the test."""
    keys = [key for _, key, _, _ in string.Formatter().parse(row["figure"]) if key is not None]
    if "result" not in row:
        if keys:
            raise ValueError(f"{file}: {row['figure']!r} has keys and names no result")
        return f"in a test: {row['figure']}"
    if not keys:
        raise ValueError(
            f"{file}: {row['figure']!r} takes nothing from {row['result']}; figures are not typed: say {{key}}"
        )
    path = RESULTS / row["result"]
    if not path.is_file():
        return f"not measured yet ({row['result']})"
    try:
        return _FromResult().vformat(row["figure"], (), json.loads(path.read_text("utf-8")))
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise ValueError(f"{file}: {row['figure']!r} cannot be filled from {path}: {err}") from err


class _FromResult(string.Formatter):
    """`{a.b.0}` walks through the tables and lists of a result."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = kwargs
        for part in field_name.split("."):
            if isinstance(value, dict) and part not in value:
                raise KeyError(f"no {part!r} among {', '.join(sorted(value))}")
            value = value[int(part)] if isinstance(value, list) else value[part]
        if value is None or isinstance(value, dict | list):
            raise ValueError(f"{field_name} is no figure")
        return value, field_name


def _source(name: str) -> str:
    """One line: where the figures are from, on what, when."""
    path = RESULTS / name
    if not path.is_file():
        return f"- {name}: not measured yet."
    data = json.loads(path.read_text("utf-8"))
    about = [
        data.get("device"),
        data.get("torch") and f"torch {data['torch']}",
        data.get("commit") and f"commit {data['commit']}",
    ]
    about.append((data.get("date") or "")[:10])
    return f"- [{name}](../{path.as_posix()}): {', '.join(x for x in about if x)}."
