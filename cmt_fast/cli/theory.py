"""`cmt theory`: solver orders and gradient bias where the answer is known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cmt_fast.evaluation import theory


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_theory)
    p.add_argument("--json", type=Path, help="write the figures here too")


def run_theory(args: argparse.Namespace) -> None:
    figures = theory.measure()
    print(theory.as_text(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
