"""`cmt theory`: solver orders and gradient bias where the answer is known, and pictures of what each objective learns there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.evaluation import theory


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_theory)
    p.add_argument("--json", type=Path, help="write the figures here too")
    text = "train every objective on points of the plane instead; a page of each goes to DIR, that of all to DIR.md"
    p.add_argument("--pictures", type=Path, metavar="DIR", help=text)
    p.add_argument("--kinds", default="", metavar="A,B", help="--pictures: of these objectives alone")
    p.add_argument("--steps", type=int, metavar="N", help="--pictures: steps of each (default: 900)")


def run_theory(args: argparse.Namespace) -> None:
    if args.pictures is not None:
        return _pictures(args)
    if args.kinds or args.steps is not None:
        raise ConfigError("--kinds and --steps are of --pictures DIR")
    figures = theory.measure()
    print(theory.as_text(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def _pictures(args: argparse.Namespace) -> None:
    from cmt_fast.cli import objective_pages
    from cmt_fast.objectives import OBJECTIVES

    kinds = [kind for kind in args.kinds.split(",") if kind] or list(OBJECTIVES)
    for kind in kinds:
        if kind not in OBJECTIVES:
            raise ConfigError(
                f"--kinds: {kind!r} is none; valid are {', '.join(OBJECTIVES)}{nearest(kind, list(OBJECTIVES))}"
            )
    steps = objective_pages.plane.STEPS if args.steps is None else args.steps
    if steps < 3:
        raise ConfigError(f"--steps: {steps} is below 3")
    folder = args.pictures.absolute()  # `.` has a name too, by which the page of all is called
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--pictures: {args.pictures} cannot be made ({error.strerror})") from None
    objective_pages.write(folder, kinds, steps)
    print(args.pictures)
