"""`cmt report`: the page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.report import page
from cmt_fast.runtime import progress


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=make_report)
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/digits")
    p.add_argument(
        "--no-judge", action="store_true", help="draw what is known, in seconds; also of a run that is being trained"
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the page and new figures go (default: RUN), as of a run that can only be read",
    )


def make_report(args: argparse.Namespace) -> None:
    out = page.write(args.run, judge=not args.no_judge, out=args.out)
    if args.no_judge:
        progress.say(str(out["html"]))
