"""`cmt recipes`: what comes with the package."""

from __future__ import annotations

import argparse
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


def recipes(args: argparse.Namespace) -> None:
    known = recipes_.recipes()
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


def _validate(run: Run) -> str:
    """What a run is; of one whose store is not here, by what its recipe expects of it. Raises ConfigError."""
    from cmt_fast.config import fingerprint
    from cmt_fast.run import guidance, networks, workspace

    expects = getattr(run.data, "expects", None)
    if expects is None or Path(run.data.path).is_dir():
        parameters = workspace.Workspace(run, Path(".")).parameters
        return f"{parameters:,} parameters, {fingerprint.digest(run)[:12]}"
    try:
        parameters = networks.check(run, expects.shape, expects.classes or 0)
        guidance.check(guidance.Place(run), expects.classes or 0)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return f"{parameters:,} parameters, {fingerprint.digest(run)[:12]} ({run.data.path} is not here)"
