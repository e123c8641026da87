"""`cmt recipes`: what comes with the package."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cmt_fast.config import recipes as recipes_
from cmt_fast.config.errors import ConfigError

if TYPE_CHECKING:
    from cmt_fast.config.schema import Run


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=recipes)
    p.add_argument("action", choices=("ls", "show", "copy", "validate"))
    p.add_argument("names", nargs="*", metavar="RECIPE", help="`copy` takes a recipe and a file to write")
    p.add_argument("--all", action="store_true", help="validate every recipe of the package")
    p.add_argument(
        "--weights", type=Path, metavar="FILE", help="ls: the recipes that a checkpoint can be imported with, and how"
    )
    p.add_argument("--as", dest="family", metavar="FAMILY", help="ls --weights: what the file is (dit, sit, ...)")
    p.add_argument("--ema", metavar="KEY", help="ls --weights: which of the file's networks")


def recipes(args: argparse.Namespace) -> None:
    known = recipes_.recipes()
    for key, value in (("--weights", args.weights), ("--as", args.family), ("--ema", args.ema)):
        if value is not None and (args.action != "ls" or args.weights is None):
            raise ConfigError(f"{key}: is for cmt recipes ls --weights FILE")
    if args.weights is not None:
        return _propose(args)
    if args.action == "ls":
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:{width}s} {path.read_text('utf-8').splitlines()[0].lstrip('# ')}")
        return
    names = list(known) if args.all else args.names
    if not names or (args.action == "copy" and len(names) != 2):
        raise ConfigError(
            f"cmt recipes {args.action}: needs {'a recipe and a file to write' if args.action == 'copy' else 'a recipe'}"
        )
    if args.action == "show":
        print(recipes_.recipe_text(names[0]), end="")
    elif args.action == "copy":
        text, target = recipes_.recipe_text(names[0]), Path(names[1])
        if target.exists() or not target.parent.is_dir():
            raise ConfigError(
                f"cmt recipes copy: {names[1]!r} {'already exists' if target.exists() else 'is in a folder that does not exist'}"
            )
        target.write_text(text, "utf-8")
        print(f"{target}: a copy of {names[0]}. Its `name` says where it trains, runs/NAME; change it, or give --out")
    else:
        from cmt_fast.config import loading

        for name in names:
            print(f"{name}: valid, {_validate(loading.load(name))}")


def _propose(args: argparse.Namespace) -> None:
    """The commands that import a checkpoint, by packaged recipe. Raises ConfigError where there is none."""
    from cmt_fast.convert import files, proposing

    source = files.read(args.weights, args.ema)
    family, proposals = proposing.propose(source, args.family)
    print(f"{args.weights}: {source.kind}, family {family}; recipes that it fits, the nearest first:")
    chosen = [*(["--ema", args.ema] if args.ema else []), *(["--as", args.family] if args.family else [])]
    for recipe, overrides in proposals:
        words = ["cmt", "ckpt", "import", str(args.weights), *chosen, "--recipe", recipe, *overrides]
        print(shlex.join([*words, "--out", f"runs/{recipe}"]))
    if any("data.expects=" in o for o in proposals[0].overrides):
        print(
            "data.expects differs from the recipe's: data.path and eval.reference must be of your own rows before training"
        )
    if proposing.HEADS in proposals[0].overrides:
        print(
            f"{proposing.HEADS}: the file does not say how many heads its network has; write the number that it was built with"
        )


def _validate(run: Run) -> str:
    """What a run is; of one whose store is not here, by what its recipe expects of it. Raises ConfigError."""
    from cmt_fast.config import fingerprint
    from cmt_fast.run import absent, workspace

    data = absent.rows(run)
    parameters = workspace.Workspace(run, Path("."), data=data).parameters
    gone = f" ({data.path} is not here)" if isinstance(data, absent.AbsentRows) else ""
    return f"{parameters:,} parameters, {fingerprint.digest(run)[:12]}{gone}"
