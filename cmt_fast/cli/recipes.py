"""`cmt recipes`: what comes with the package."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cmt_fast.config import recipes as recipes_
from cmt_fast.config.errors import ConfigError
from cmt_fast.storage import files

if TYPE_CHECKING:
    from cmt_fast.config.schema import Run


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=recipes)
    p.add_argument(
        "action",
        choices=("ls", "show", "copy", "new", "validate"),
        metavar="ACTION",
        help="ls, show, copy, new or validate",
    )
    p.add_argument("names", nargs="*", metavar="RECIPE", help="`copy`: a recipe and a file to write; `new`: a name")
    p.add_argument("--all", action="store_true", help="validate every recipe of the package")
    p.add_argument(
        "--weights", type=Path, metavar="FILE", help="ls: the recipes that a checkpoint can be imported with, and how"
    )
    p.add_argument("--as", dest="family", metavar="FAMILY", help="ls --weights: what the file is (dit, sit, ...)")
    p.add_argument("--ema", metavar="KEY", help="ls --weights: which of the file's networks")
    p.add_argument("--data", metavar="STORE", help="new: the store that it trains on")
    p.add_argument("--like", metavar="RECIPE", help="new: the recipe whose method and settings it takes")
    p.add_argument(
        "--images", type=int, metavar="N", help="new: student images of mid and post together; all lengths follow"
    )
    text = "new: file of the perceptual network, for a recipe whose distance has one (default: the distance l2, which has none)"
    p.add_argument("--perceptual", metavar="FILE", help=text)


def recipes(args: argparse.Namespace) -> None:
    for key, value in (("--weights", args.weights), ("--as", args.family), ("--ema", args.ema)):
        if value is not None and (args.action != "ls" or args.weights is None):
            raise ConfigError(f"{key}: is for cmt recipes ls --weights FILE")
    if args.weights is not None:
        return _propose(args)
    if args.action == "ls":
        print("\n".join(recipes_.listed()))
        return
    names = list(recipes_.recipes()) if args.all else args.names
    needed = {"copy": (2, "a recipe and a file to write"), "new": (1, "a name")}.get(args.action)
    if not names or (needed and len(names) != needed[0]):
        raise ConfigError(f"cmt recipes {args.action}: needs {needed[1] if needed else 'a recipe'}")
    for option in ("data", "like", "images", "perceptual"):
        if args.action != "new" and getattr(args, option) is not None:
            raise ConfigError(f"--{option}: is for `cmt recipes new`")
    if args.action == "show":
        print(recipes_.recipe_text(names[0]), end="")
    elif args.action == "copy":
        _copy(names[0], _free(Path(names[1]), "copy"))
    elif args.action == "new":
        _new(args)
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


def _free(target: Path, action: str) -> Path:
    """A file that can be written. Raises ConfigError where one stands already, or its folder does not."""
    if target.exists() or not target.parent.is_dir():
        wrong = "already exists" if target.exists() else "is in a folder that does not exist"
        raise ConfigError(f"cmt recipes {action}: {str(target)!r} {wrong}")
    return target


def _copy(name: str, target: Path) -> None:
    from cmt_fast.config import loading
    from cmt_fast.run import needs

    text = recipes_.recipe_text(name)
    missing, here = needs.listed(loading.load(name))
    files.write_text(target, text)
    print(f"{target}: a copy of {name}. Its `name` says where it trains, runs/NAME; change it, or give --out")
    if missing:
        print("to be brought, not on this machine:", *missing, sep="\n  ")
    if here:
        print("here already:", *here, sep="\n  ")


def _new(args: argparse.Namespace) -> None:
    from cmt_fast.run import adapting

    for option, what in (("data", "the store that it trains on"), ("like", "the recipe whose method it takes")):
        if getattr(args, option) is None:
            raise ConfigError(f"cmt recipes new: --{option} is missing, {what}")
    if args.images is not None and args.images < 1:
        raise ConfigError(f"--images: {args.images} is not at least 1")
    name = args.names[0].removesuffix(".yaml")
    if name in recipes_.recipes():
        raise ConfigError(f"cmt recipes new: {name!r} is the name of a recipe of the package; choose another")
    target = _free(Path(f"{name}.yaml"), "new")
    made = adapting.adapted(Path(name).name, args.data, args.like, args.images, args.perceptual)
    files.write_text(target, made.text)
    print(f"{target}: like {args.like}, for {args.data}. It trains by: {shlex.join(['cmt', 'train', str(target)])}")
    print("changed:", *made.changed, sep="\n  ")


def _validate(run: Run) -> str:
    """What a run is; of one whose store is not here, by what its recipe expects of it. Raises ConfigError."""
    from cmt_fast.config import fingerprint
    from cmt_fast.run import absent, workspace

    data = absent.rows(run)
    parameters = workspace.Workspace(run, Path("."), data=data).parameters
    gone = f" ({data.path} is not here)" if isinstance(data, absent.AbsentRows) else ""
    return f"{parameters:,} parameters, {fingerprint.digest(run)[:12]}{gone}"
