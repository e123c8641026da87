"""The promises of docs/promises.yaml as a table, each with the files of the tests that hold it.

A promise names test functions; where they are is looked up, so a test that is renamed, moved or deleted shows here.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

TEXTS, TESTS = Path("docs/promises.yaml"), Path("tests")


def table(_: str = "") -> str:
    """A section for each subject. Raises ValueError for a test that does not exist, or a name that two files have."""
    found = functions()
    out = []
    for subject, promises in yaml.safe_load(TEXTS.read_text("utf-8")).items():
        out += [f"\n## {subject}\n", "| promise | test |", "|---|---|"]
        for promise, names in promises.items():
            out.append(f"| {promise} | {', '.join(link(name, found) for name in names.split())} |")
    return "\n".join(out) + "\n\n"


def functions() -> dict[str, list[Path]]:
    """Test function -> the files that define one of that name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), flags=re.M):
            found.setdefault(name, []).append(path)
    return found


def link(name: str, found: dict[str, list[Path]], file: Path = TEXTS) -> str:
    """`name`, or FILE::name where several files have one, as a link from a page in docs/; `file` is what names it."""
    stem, _, function = name.rpartition("::")
    paths = [p for p in found.get(function, []) if stem in ("", p.stem)]
    if len(paths) != 1:
        raise ValueError(f"{file}: {name} is in {len(paths)} test files, and it must be in one")
    return f"[{function}](../{paths[0].as_posix()})"
