"""`cmt ckpt`: the checkpoints of a run; those of other projects in, ours out."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.convert import card
from cmt_fast.engine import posthoc_ema
from cmt_fast.run import folder as folder_
from cmt_fast.run import workspace

PLAIN = ("edm2", "dit", "sit", "meanflow")  # the names of those projects
LICENCES = dict(zip(card.OPTIONS, ("these weights", "the data", "the teacher")))


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, call, text: str) -> argparse.ArgumentParser:
        inner = actions.add_parser(name, help=text, description=text)
        inner.set_defaults(call=call)
        return inner

    for name, call, text in (
        ("ls", list_, "list a run's checkpoints"),
        ("verify", verify, "check them, and every other file that a run reads, against their checksums"),
    ):
        action(name, call, text).add_argument(
            "run", type=Path, metavar="RUN", help="a run's folder, such as runs/digits"
        )

    p = action("reconstruct", reconstruct, "an EMA of any width from a stage's snapshots")
    p.add_argument("run", type=Path, metavar="RUN/STAGE", help="a stage of a run, such as runs/digits/post")
    p.add_argument("--sigma-rel", type=float, help="relative width of the profile")
    p.add_argument("--out", type=Path, help="the .safetensors file to write")

    p = action(
        "import", import_, "a public checkpoint (EDM, EDM2, DiT, safetensors) becomes the finished stage pre of a run"
    )
    p.add_argument("file", type=Path, metavar="FILE", help="the checkpoint; nothing in it is executed")
    add_overrides(p)
    p.add_argument("--recipe", required=True, help="the recipe whose network the file must fit: a name or YAML file")
    p.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder, for cmt train --from")
    p.add_argument("--ema", metavar="KEY", help="which of the file's networks (default: its EMA, if it has one)")
    p.add_argument(
        "--as",
        "--family",
        dest="family",
        metavar="FAMILY",
        help="what the file is (dit, sit, repa, ...), where neither its tensors nor its arguments tell",
    )

    p = action("export", export, "a stage's network as one file, or as a folder that diffusers loads")
    p.add_argument("stage", metavar="RUN/STAGE", help="a stage of a run, such as runs/digits/post")
    text = "the file, or with --format diffusers the folder; must not exist"
    p.add_argument("out", type=Path, metavar="OUT", help=text)
    p.add_argument(
        "--format",
        choices=("safetensors", "diffusers", "onnx", *PLAIN),
        default="safetensors",
        help="safetensors (default): all of the network, for cmt ckpt import; diffusers: a folder; onnx: one graph of one and "
        "two steps; else a state dict by the names of that project",
    )
    p.add_argument("--ema", type=int, default=0, metavar="I", help="index of the stage's EMA (default: 0, the first)")
    p.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="diffusers: the autoencoder's folder, copied into the pipeline"
    )
    for option, of in LICENCES.items():
        text = f"diffusers: the licence of {of}, for the card, such as apache-2.0 (default: not stated)"
        p.add_argument(option, metavar="ID", help=text)


def reconstruct(args: argparse.Namespace) -> None:
    posthoc_ema.reconstruct(args.run, args.sigma_rel, args.out)


def list_(args: argparse.Namespace) -> None:
    folder_.stored_run(args.run)
    for folder in sorted(args.run.glob("*/checkpoints/step-*")):
        size = sum(f.lstat().st_size for f in folder.iterdir()) if folder.is_dir() else 0
        print(f"{folder.relative_to(args.run)}  {size / 1e6:.1f} MB")


def verify(args: argparse.Namespace) -> None:
    from cmt_fast.report import proving

    bad, other = 0, 0
    for found in proving.run(args.run):
        name = found.path.relative_to(args.run)
        if found.wrong:
            bad += 1
            print(f"cmt: {found.path}: {found.wrong}", file=sys.stderr)
        elif found.path.name.startswith("step-"):
            print(f"{name}: {found.said}")
        else:
            other += 1
    print(f"{other} other files are sound")
    if bad:
        raise ConfigError(f"{args.run}: {bad} damaged")


def import_(args: argparse.Namespace) -> None:
    from cmt_fast.convert import files, importing

    run = loading.load(args.recipe, args.overrides)
    if run.pre is None:
        raise ConfigError(f"--recipe: {args.recipe} has no stage pre, which is what a file is imported as")
    source = files.read(args.file, args.ema)
    work = workspace.Workspace(run, args.out, data=importing.rows(source, run, args.family), reading=True)
    parity = importing.compare(source, run, work.data, args.family)
    print(importing.text(source, parity))
    importing.write(source, parity, work)
    again = shlex.join(["cmt", "train", args.recipe, *args.overrides, "--from", str(args.out), "--stages", "mid,post"])
    print(f"{args.out / 'pre'}: finished; next: {again}")


def export(args: argparse.Namespace) -> None:
    from cmt_fast.convert import diffusers_folder, exporting

    work, stage = workspace.open_stage(args.stage)
    found = exporting.collect(work, stage, args.ema)
    for option in ("--vae", *LICENCES):
        if args.format != "diffusers" and getattr(args, option[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{option}: is for --format diffusers")
    if args.format in PLAIN:
        exporting.check_plain(found, args.format)
    if args.format == "safetensors":
        exporting.to_safetensors(found, args.out)
    elif args.format == "onnx":
        from cmt_fast.convert import onnx_graph

        print(onnx_graph.to_onnx(found, args.out))
    elif args.format in PLAIN:
        from cmt_fast.convert import plain

        print(plain.write(found, args.format, args.out))
    else:
        terms = card.Terms(args.license, args.data_license, args.teacher_license)
        diffusers_folder.write(found, args.out, args.vae, terms)
        if unsaid := card.unsaid(work, found.about, terms):
            print(f"licences: the card says 'not stated'; say them with {', '.join(unsaid)} (such as apache-2.0)")
    print(f"{args.out}: EMA {args.ema} of {args.stage}, {len(found.weights)} tensors")
