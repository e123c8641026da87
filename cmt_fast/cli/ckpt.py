"""`cmt ckpt`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cmt_fast import checkpoint, posthoc
from cmt_fast import workspace as ws
from cmt_fast.cli.parser import Command
from cmt_fast.config import ConfigError


def add(command: Command) -> None:
    """Declare these commands."""
    p = command("ckpt", ckpt, "list or verify the checkpoints of a run; reconstruct an EMA profile")
    p.add_argument("action", choices=("ls", "verify", "reconstruct"))
    p.add_argument("run", type=Path, metavar="RUN", help="a run (reconstruct: RUN/STAGE)")
    p.add_argument("--sigma-rel", type=float, help="reconstruct: relative width of the profile")
    p.add_argument("--out", type=Path, help="reconstruct: the .safetensors file to write")


def ckpt(args: argparse.Namespace) -> None:
    if args.action == "reconstruct":
        return posthoc.reconstruct(args.run, args.sigma_rel, args.out)
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
