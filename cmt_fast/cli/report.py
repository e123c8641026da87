"""`cmt report`: the page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.report import page


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=make_report)
    p.add_argument("run", type=Path, metavar="RUN")


def make_report(args: argparse.Namespace) -> None:
    page.write(args.run)
