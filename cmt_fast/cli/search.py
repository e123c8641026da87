"""`cmt search`: one stage over a grid of settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config.schema import STAGES
from cmt_fast.train import grid_search


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_search)
    p.add_argument("recipe", help="name or YAML file")
    p.add_argument("stage", metavar="STAGE", choices=STAGES, help="the stage to search")
    add_overrides(p)
    p.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="a.b=v1,v2 [c=v1,v2]",
        help="values to combine; repeat the option to add another grid",
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the runs that are tried")
    p.add_argument("--record", type=Path, help="where the table is written (default: OUT/search.json)")


def run_search(args: argparse.Namespace) -> None:
    grid_search.run(args.recipe, args.stage, args.overrides, args.grid, args.out, args.record)
