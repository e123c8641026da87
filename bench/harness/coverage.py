"""`python -m bench coverage`: per cent of the lines of every room of cmt_fast that `make coverage` saw run."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from bench.harness.results_file import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the measurement lies."""
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage", help="what coverage.py wrote")


def by_room(data: Path) -> dict[str, tuple[int, int]]:
    """Room -> lines that can run, and those that ran. Raises OSError where nothing was measured."""
    from coverage import Coverage

    if not data.is_file():
        raise OSError(f"{data} is not there: make coverage writes it")
    found = Coverage(data_file=str(data))
    found.load()
    lines: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for path in sorted((ROOT / "cmt_fast").rglob("*.py")):
        _, statements, _, missing, _ = found.analysis2(str(path))
        room = path.relative_to(ROOT / "cmt_fast").parts[0].removesuffix(".py")
        lines[room] += len(statements)
        ran[room] += len(statements) - len(missing)
    return {room: (lines[room], ran[room]) for room in sorted(lines) if lines[room]}


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rooms = by_room(arguments.data)
    for room, (lines, ran) in [*rooms.items(), ("all", tuple(map(sum, zip(*rooms.values()))))]:
        print(f"{room:12s} {lines:6,d} lines {ran / lines:6.1%}")
    return 0
