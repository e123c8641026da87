"""What users bring and what is made of it: the tables of docs/inputs/*.yaml, each row with the test that holds it.

A file is a `title` and `rows`; a row has `given`, `now` (what is said, or computed), `test`, and `report` where somebody met
it in public, as owner/repository#number.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from bench.harness.pages.promises import functions, link

FOLDER = Path("docs/inputs")
REPORT = re.compile(r"[\w.-]+/[\w.-]+#\d+")


def table(_: str = "") -> str:
    """A section for each file. Raises ValueError for a test that does not exist and for a row that lacks a part."""
    found = functions()
    out = []
    for file in sorted(FOLDER.glob("*.yaml")):
        part = yaml.safe_load(file.read_text("utf-8"))
        out += [f"\n## {part['title']}\n", "| given | what is said or computed | test |", "|---|---|---|"]
        out += [_row(file, row, found) for row in part["rows"]]
    return "\n".join(out) + "\n\n"


def count() -> int:
    """Rows of all files."""
    return sum(len(yaml.safe_load(file.read_text("utf-8"))["rows"]) for file in FOLDER.glob("*.yaml"))


def _row(file: Path, row: dict[str, str], found: dict[str, list[Path]]) -> str:
    if not {"given", "now", "test"} <= set(row) <= {"given", "now", "test", "report"}:
        raise ValueError(f"{file}: {row} needs given, now and test, and may have report")
    given = row["given"]
    if "report" in row:
        reports = row["report"].split()
        if not all(map(REPORT.fullmatch, reports)):
            raise ValueError(f"{file}: {row['report']!r} is no owner/repository#number")
        links = (f"[{r}](https://github.com/{r.replace('#', '/issues/')})" for r in reports)
        given += f" ({', '.join(links)})"
    return f"| {given} | {row['now']} | {', '.join(link(name, found, file) for name in row['test'].split())} |"
