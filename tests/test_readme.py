"""The README's targets exist; its file tree names files that are there. Its commands are run by test_commands.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.harness import gpu_tables

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("target", [x.split()[1] for x in LINES if x.startswith("make ")])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


def test_the_file_tree_names_files_that_are_there():
    tree = TEXT.split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        first = line.split("  ")[0] if not line.startswith("  ") else ""
        folder = first.split()[0] if first else folder
        for name in re.findall(r"[\w/]+\.py\b", line):
            name, root = name.lstrip("/"), ROOT / folder
            assert (root / name).exists() or list(root.rglob(name)), f"{name} is not under {folder}"


def test_tables_are_generated_not_typed():
    marks = re.findall(r"<!-- table: ([\w-]+) -->", TEXT + (ROOT / "bench" / "README.md").read_text("utf-8"))
    assert len(marks) == len(set(marks))
    for mark in marks:
        kind, _, recipe = mark.partition("-")
        if kind in gpu_tables.CARDS:  # what no card has measured yet says so in place of a table
            assert recipe in gpu_tables.TABLES, mark
            continue
        name = {"predicted": "predicted/ops", "predicted-steps": "predicted/steps", "native": "cpu/ops"}.get(
            mark, "cpu/" + (f"{recipe}-{kind}" if recipe else kind)
        )
        assert (ROOT / "bench" / "results" / f"{name}.json").is_file(), mark
