"""`python -m bench grid SUITE`: objective x start x equal images or forwards x seed, each cell a small run of its own.

Run it again to go on: cells that are done are read from OUT/cells, one that was killed goes on from its checkpoint. It asks for
one process and one thread: `OMP_NUM_THREADS=1 nohup setsid nice -n 19 python -m bench grid digits --out DIR &`. Objectives that
come later are measured by the same command, and the JSON holds all that DIR has.

`--question NAME` asks one of mid-training's own questions instead (bench/grid/questions.py), of ECT and MeanFlow or of the one
that `--kinds` names. `--dry-run` counts cells, images and
forwards. Learning rates are searched first, on a seed of their own (bench/grid/tuning.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.grid import advised, cells, collected, drawn, questions, tuning
from bench.grid.cells import ALONE, EQUAL, STARTS, SUITES, Cell
from bench.grid.machine import Machine
from bench.harness.pages.grid_tables import PICTURES
from bench.harness.tables import RESULTS
from cmt_fast.config.errors import ConfigError, nearest


def add_arguments(p: argparse.ArgumentParser) -> None:
    """SUITE, and what of the grid is asked for."""
    p.add_argument("suite", choices=SUITES)
    p.add_argument("--kinds", type=_words, default=(), metavar="A,B", help="objectives, or KIND@PATH (default: all)")
    p.add_argument(
        "--starts", type=_words, default=STARTS, metavar="A,B", help=f"of {', '.join(STARTS)} (default: all)"
    )
    p.add_argument("--seeds", type=_words, default=("0", "1", "2"), metavar="0,1,2")
    p.add_argument("--question", metavar="NAME", help=f"of {', '.join(questions.QUESTIONS)}, or `all`")
    p.add_argument("--out", type=Path, help="default: runs/grid")
    p.add_argument("--json", type=Path, help="default: bench/results/cpu/grid-SUITE.json")
    p.add_argument("--dry-run", action="store_true", help="say what there is to do")
    p.add_argument("--collect", action="store_true", help="measure nothing: write what OUT has")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, cell by cell, and write the JSON after each seed of an objective; 2 for what cannot be asked."""
    try:
        return _run(args)
    except ConfigError as error:
        print(f"bench grid: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    for start in args.starts:
        if start not in STARTS:
            raise ConfigError(f"--starts: {start!r} is no start; valid are {', '.join(STARTS)}{nearest(start, STARTS)}")
    if wrong := [seed for seed in args.seeds if not seed.isdigit() or int(seed) >= tuning.SEED]:
        raise ConfigError(
            f"--seeds: {wrong[0]!r} is no seed; valid are 0 to {tuning.SEED - 1}, {tuning.SEED} is that of the search"
        )
    seeds = [int(seed) for seed in args.seeds]
    machine = Machine(args.out or Path("runs/grid"))
    file = args.json or RESULTS / f"grid-{args.suite}.json"
    if args.dry_run:
        return _said(args.suite, args.kinds, args.starts, seeds)
    write = lambda: _written(machine, args.suite, file, drawing=args.json is None)
    if args.collect:
        write()
        return 0
    if args.question:
        paths = questions.paths(args.kinds)
        for name in questions.named(args.question):
            for cell in questions.cells_of(machine, args.suite, name, seeds, paths):
                _measure(machine, cell)
            write()
        return 0
    asked = cells.objectives(args.kinds, args.suite)
    for kind, path in asked:
        rates = {start: tuning.tuned(machine, args.suite, kind, path, start)["lr"] for start in args.starts}
        print(f"{kind} on {path}: {', '.join(f'{start} {lr:g}' for start, lr in rates.items())}", flush=True)
        for seed in seeds:
            for cell in cells.of_kind(args.suite, kind, path, seed, rates, args.starts):
                _measure(machine, cell)
            _measure(machine, Cell(args.suite, ALONE, path, "pre", "images", seed, tuning.ALONE_LR))
            write()
    return 0


def _written(machine: Machine, suite: str, file: Path, drawing: bool) -> None:
    """The JSON; where it is the tree's own, the picture of docs/grid.md and `cmt plan`'s advice too."""
    data = json.loads(collected.write(machine, suite, file).read_text("utf-8"))
    print(file, flush=True)
    if drawing and any(row["start"] == "mid" for row in data["rows"]):
        print(drawn.draw(data, PICTURES / f"{suite}.png"), flush=True)
        print(advised.write(data), flush=True)


def _measure(machine: Machine, cell: Cell) -> None:
    known = machine.known(cell) is not None
    row = machine.measure(cell)
    if not known:
        shown = row.get("failed") or {k: round(own["frechet"], 3) for k, own in row["steps"].items()}
        print(f"{cell.name}: {shown}, {sum(row['cpu_s'].values()):.1f} s of a core", flush=True)


def _said(suite: str, kinds: tuple[str, ...], starts: tuple[str, ...], seeds: list[int]) -> int:
    """What the grid would train: no network is built."""
    total, count = 0.0, 0
    for kind, path in cells.objectives(kinds, suite):
        for cell in cells.of_kind(suite, kind, path, 0, dict.fromkeys(starts, 1e-3), starts):
            spent = cells.spent(cell, cells.run_of(cell))
            images, forwards = spent["images"], spent["forwards"]
            total, count = total + sum(forwards.values()) * len(seeds), count + len(seeds)
            shown = " + ".join(f"{n:,} {name}" for name, n in images.items())
            print(
                f"{kind:>12} {path:>6} {start_of(cell):>18}: {shown} images, {forwards['student']:,.0f} forwards of the "
                f"student and {forwards['teacher']:,.0f} of the teacher"
            )
    tries = 3 * len({tuning.SEARCHED[start] for start in starts}) * len(cells.objectives(kinds, suite))
    print(f"{count} cells, {total:,.0f} forwards; {tries} cells to find learning rates")
    return 0


def start_of(cell: Cell) -> str:
    """`pre, images`; the cell from mid is the same by both."""
    return f"{cell.start}, {cell.equal if cell.start != 'mid' else ' and '.join(EQUAL)}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
