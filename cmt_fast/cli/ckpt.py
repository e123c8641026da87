"""`cmt ckpt`: the checkpoints of a run; those of other projects in, ours out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cmt_fast import checkpoint, config, posthoc
from cmt_fast import workspace as ws
from cmt_fast.cli.parser import Command
from cmt_fast.config import ConfigError


def add(command: Command) -> None:
    """Declare these commands."""
    p = command("ckpt", ckpt, "list, verify, import and export checkpoints; reconstruct an EMA profile")
    p.add_argument("action", choices=("ls", "verify", "reconstruct", "import", "export"))
    p.add_argument("run", type=Path, metavar="RUN", help="a run (reconstruct, export: RUN/STAGE; import: FILE)")
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help="import: of the recipe")
    p.add_argument("--sigma-rel", type=float, help="reconstruct: relative width of the profile")
    p.add_argument("--out", type=Path, help="where to write: a .safetensors file; import: the run's folder")
    p.add_argument("--recipe", help="import: the recipe whose stage pre the file becomes")
    p.add_argument(
        "--ema", metavar="KEY", help="import: which of the file's networks (default: its EMA, if it has one)"
    )


def ckpt(args: argparse.Namespace) -> None:
    if args.overrides and args.action != "import":
        raise ConfigError(f"cmt ckpt {args.action}: unknown argument {args.overrides[0]!r}")
    {
        "ls": list_,
        "verify": list_,
        "reconstruct": lambda a: posthoc.reconstruct(a.run, a.sigma_rel, a.out),
        "import": import_,
    }[args.action](args)


def list_(args: argparse.Namespace) -> None:
    ws.stored_run(args.run)
    bad = 0
    for folder in sorted(args.run.glob("*/checkpoints/step-*")):
        if args.action == "ls":
            size = sum(f.stat().st_size for f in folder.iterdir())
            print(f"{folder.relative_to(args.run)}  {size / 1e6:.1f} MB")
            continue
        try:
            found = checkpoint.verify(folder)
            print(f"{folder.relative_to(args.run)}: sound, {found.manifest['nimg']} images")
        except checkpoint.CheckpointError as error:
            bad += 1
            print(f"cmt: {error}", file=sys.stderr)
    if bad:
        raise ConfigError(f"{args.run}: {bad} damaged checkpoints")


def import_(args: argparse.Namespace) -> None:
    from cmt_fast.convert import files, importing

    for name in ("recipe", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name}: is missing; cmt ckpt import FILE --recipe RECIPE --out RUN")
    run = config.load(args.recipe, args.overrides)
    source = files.read(args.run, args.ema)
    work = ws.Workspace(run, args.out)
    parity = importing.compare(source, work)
    print(importing.text(source, parity))
    importing.write(source, parity, work)
    print(f"{args.out / 'pre'}: finished; next: cmt train {args.recipe} --from {args.out} --stages mid,post")
