"""`cmt recipes` and `cmt doctor`: what comes with the package, what the machine has."""

from __future__ import annotations

import argparse
from pathlib import Path

import cmt_kernels
from cmt_kernels import assembler

from cmt_fast import config, log, machine
from cmt_fast import workspace as ws
from cmt_fast.cli.parser import Command
from cmt_fast.config import ConfigError
from cmt_fast.data import dali
from cmt_fast.schema import Run


def add(command: Command) -> None:
    """Declare these commands."""
    p = command("recipes", recipes, "the recipes that come with the package: ls, show, copy, validate")
    p.add_argument("action", choices=("ls", "show", "copy", "validate"))
    p.add_argument("names", nargs="*", metavar="RECIPE", help="`copy` takes a recipe and a file to write")
    p.add_argument("--all", action="store_true", help="validate every recipe of the package")

    p = command("doctor", doctor, "what this machine has: versions, devices, ops; whether a run is alive")
    p.add_argument("--heartbeat", type=Path, metavar="RUN", help="only this: fail unless RUN, or a run in it, is alive")
    p.add_argument(
        "--older-than", type=float, default=900.0, metavar="S", help="a heartbeat older than S seconds fails"
    )


def recipes(args: argparse.Namespace) -> None:
    known = config.recipes()
    if args.action == "ls":
        for name, path in known.items():
            print(f"{name:12s} {path.read_text('utf-8').splitlines()[0].lstrip('# ')}")
        return
    names = list(known) if args.all else args.names
    if not names or (args.action == "copy" and len(names) != 2):
        raise ConfigError(
            f"cmt recipes {args.action}: needs {'a recipe and a file to write' if args.action == 'copy' else 'a recipe'}"
        )
    if args.action == "show":
        print(config.recipe_text(names[0]), end="")
    elif args.action == "copy":
        text, target = config.recipe_text(names[0]), Path(names[1])
        if target.exists() or not target.parent.is_dir():
            raise ConfigError(
                f"cmt recipes copy: {names[1]!r} {'exists' if target.exists() else 'is in no folder that exists'}"
            )
        target.write_text(text, "utf-8")
        print(f"{target}: a copy of {names[0]}")
    else:
        for name in names:
            print(f"{name}: valid, {_validate(config.load(name))}")


def _validate(run: Run) -> str:
    """What a run is; of one whose store is not here, by what its recipe expects of it. Raises ConfigError."""
    expects = getattr(run.data, "expects", None)
    if expects is None or Path(run.data.path).is_dir():
        parameters = ws.Workspace(run, Path(".")).parameters
        return f"{parameters:,} parameters, {config.digest(run)[:12]}"
    try:
        parameters = ws.check(run, expects.shape, expects.classes or 0)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return f"{parameters:,} parameters, {config.digest(run)[:12]} ({run.data.path} is not here)"


def doctor(args: argparse.Namespace) -> None:
    if args.heartbeat:
        age = log.heartbeat(args.heartbeat)
        if age is None or age > args.older_than:
            ago = "has never been alive" if age is None else f"was alive {age:.0f} s ago"
            raise OSError(f"{args.heartbeat}: {ago}, at most {args.older_than:.0f} s are allowed")
        return print(f"{args.heartbeat}: alive {age:.0f} s ago")
    for key, value in machine.environment().items():
        print(f"{key:10s} {value}")
    _assemblers()
    print(f"dali       {dali.version() or 'not installed'}")
    for op in cmt_kernels.OPS:
        print(f"op {op:18s} {' > '.join(cmt_kernels.available(op))}")
    print(f"recipes    {', '.join(config.recipes())}")


def _assemblers() -> None:
    """What could assemble Triton's kernels here, which does (without a GPU: for an H100), and why attention refuses it."""
    card = assembler.card() or assembler.WGMMA
    choice = assembler.choose(card)
    for found in assembler.candidates():
        taken = choice.assembler and found.path == choice.assembler.path
        print(f"ptxas      {found.version_text} at {found.path}{f' (for sm_{card}, {choice.why})' if taken else ''}")
    if not choice.assembler or assembler.refusal(card):
        print(f"ptxas      {assembler.refusal(card) or choice.why}")
