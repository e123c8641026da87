"""The `cmt` command: parse, build, call. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import cmt_kernels
import numpy as np
import torch
import yaml

from cmt_fast import (
    __version__,
    checkpoint,
    config,
    distributed,
    loop,
    pictures,
    posthoc,
    report,
    search,
    stages,
    theory,
)
from cmt_fast import workspace as ws
from cmt_fast.compiled import CompileError
from cmt_fast.config import ConfigError
from cmt_fast.schema import STAGES


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here."""

    def error(self, message: str):
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = config.nearest(match[1], re.findall(r"[\w-]+", match[2])) if match else ""
        raise ConfigError(f"{self.prog}: {message}{hint}")


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="cmt", description="Consistency Mid-Training: from a diffusion model to one or two steps.")
    root.add_argument("--version", action="version", version=f"cmt-fast {__version__}")
    commands = root.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    def command(name: str, call, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(call=call)
        return p

    p = command("train", train, "train the stages of a recipe; the same command again goes on where it stopped")
    p.add_argument("recipe", nargs="?", default="digits", help="name or YAML file (default: digits)")
    p.add_argument("overrides", nargs="*", metavar="a.b=value")
    p.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    p.add_argument("--stages", help="comma-separated (default: all the recipe has)")
    p.add_argument(
        "--from", dest="parents", type=Path, metavar="RUN", help="take stages not trained here from another run"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print the resolved run, the op table and the cost; write nothing"
    )

    p = command("sample", sample, "samples of a trained stage as .npz, as a picture, or both")
    p.add_argument("stage", metavar="RUN/STAGE")
    p.add_argument("--steps", type=int, default=1, help="network calls (default: 1)")
    p.add_argument("--n", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--solver", action="store_true", help="integrate the ODE, as a diffusion model is sampled")
    p.add_argument("--out", type=Path, help="images (N, C, H, W) float32 in data units, labels (N,)")
    p.add_argument("--grid", type=Path, help="a PNG of the first samples")

    p = command("eval", evaluate, "Fréchet distance, class accuracy and sliced Wasserstein of a trained stage")
    p.add_argument("stage", metavar="RUN/STAGE")
    p.add_argument("--steps", default="1,2", help="comma-separated numbers of network calls (default: 1,2)")
    p.add_argument("--n", type=int, help="samples (default: the recipe's)")
    p.add_argument("--seed", type=int, help="seed of the noise (default: the recipe's)")
    p.add_argument("--solver", action="store_true")
    p.add_argument("--json", action="store_true")

    p = command("report", make_report, "write RUN/report.html and RUN/report.md")
    p.add_argument("run", type=Path, metavar="RUN")

    p = command("search", run_search, "train one stage over a grid of settings and record the figures")
    p.add_argument("recipe")
    p.add_argument("stage", metavar="STAGE", choices=STAGES)
    p.add_argument("overrides", nargs="*", metavar="a.b=value")
    p.add_argument(
        "--grid", action="append", required=True, metavar="a.b=v1,v2 [c=v1,v2]", help="crossed; repeat to add grids"
    )
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--record", type=Path, help="where the table is written (default: OUT/search.json)")

    p = command(
        "theory", run_theory, "solver order and gradient bias on a Gaussian mixture, against the paper's slopes"
    )
    p.add_argument("--json", type=Path, help="write the figures here too")

    p = command("recipes", recipes, "the recipes that come with the package: ls, show, copy, validate")
    p.add_argument("action", choices=("ls", "show", "copy", "validate"))
    p.add_argument("names", nargs="*", metavar="RECIPE", help="`copy` takes a recipe and a file to write")
    p.add_argument("--all", action="store_true", help="validate every recipe of the package")

    p = command("ckpt", ckpt, "list or verify the checkpoints of a run; reconstruct an EMA profile")
    p.add_argument("action", choices=("ls", "verify", "reconstruct"))
    p.add_argument("run", type=Path, metavar="RUN", help="a run (reconstruct: RUN/STAGE)")
    p.add_argument("--sigma-rel", type=float, help="reconstruct: relative width of the profile")
    p.add_argument("--out", type=Path, help="reconstruct: the .safetensors file to write")

    command("doctor", doctor, "what this machine has: versions, devices, ops")
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run a command. 0 done, 1 failed, 2 wrong input, 128 + n stopped by signal n."""
    try:
        args, rest = parser().parse_known_args(arguments)
        if rest:
            if any(r.startswith("-") for r in rest) or not hasattr(args, "overrides"):
                known = [a for p in _subparsers() for a in p._option_string_actions]
                raise ConfigError(f"cmt {args.command}: unknown argument {rest[0]!r}{config.nearest(rest[0], known)}")
            args.overrides += rest
        args.call(args)
        return 0
    except (ConfigError, checkpoint.CheckpointError) as error:
        print(f"cmt: {error}", file=sys.stderr)
        return 2
    except loop.Stopped as stopped:
        print("cmt: stopped; a checkpoint is on disk, the same command goes on from it", file=sys.stderr)
        return int(stopped.code or 1)
    except (CompileError, FloatingPointError, OSError) as error:
        print(f"cmt: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()


def _subparsers():
    return next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices.values()


def _resolve(recipe: str, overrides: list[str]):
    if "=" in recipe and not Path(recipe).is_file():  # `cmt train post.lr=1e-3` means digits
        recipe, overrides = "digits", [recipe, *overrides]
    return config.load(recipe, overrides)


def train(args: argparse.Namespace) -> None:
    run = _resolve(args.recipe, args.overrides)
    out = args.out or Path("runs") / re.sub(r"[^\w.-]+", "-", run.name)
    have = stages.names(run)
    names = args.stages.split(",") if args.stages else have
    for name in names:
        if name not in have:
            raise ConfigError(
                f"--stages: {name!r} is not valid; this recipe has {', '.join(have)}{config.nearest(name, have)}"
            )
    if args.parents:
        ws.stored_run(args.parents)
    distributed.start(ws.device(run.device))
    work = ws.Workspace(run, out, args.parents)
    names = [name for name in have if name in names]
    for i, name in enumerate(names):
        stage = run.stage(name)
        for key in ("start", "teacher"):
            parent = getattr(stage, key)
            if parent and parent not in names[:i]:
                work.weights(parent)
    if args.dry_run:
        return _dry_run(work, names)
    work.compare()
    if distributed.rank() == 0:
        _ops(work.device.type)
    loop.train(work, names)
    if distributed.rank() == 0:
        report.write(out)


def _ops(device: str) -> None:
    print("ops: " + ", ".join(f"{op} {name}" for op, name in cmt_kernels.table(device).items()))


def _dry_run(work: ws.Workspace, names: list[str]) -> None:
    print(yaml.safe_dump(config.dump(work.run), sort_keys=False).rstrip())
    print(f"digest: {config.digest(work.run)}")
    _ops(work.device.type)
    parameters = sum(p.numel() for p in work.build().parameters())
    print(f"network: {parameters:,} parameters; device {work.device}; {len(work.data.x):,} rows of {work.data.shape}")
    for name in names:
        c = loop.cost(work.run, name)
        how = " (compiled)" if work.run.stage(name).compile else ""
        print(f"{name:>8}: {c['steps']:,} steps, {c['images']:,} images, {c['forwards']:,.0f} network forwards{how}")


def sample(args: argparse.Namespace) -> None:
    work, stage = ws.open_stage(args.stage)
    if args.steps < 1 or args.n < 1:
        raise ConfigError(f"--{'steps' if args.steps < 1 else 'n'}: must be at least 1")
    if not args.out and not args.grid:
        raise ConfigError("cmt sample: nothing to write; give --out FILE.npz, --grid FILE.png or both")
    for path in (args.out, args.grid):
        if path and not path.parent.is_dir():
            raise ConfigError(f"--{'out' if path is args.out else 'grid'}: the folder of {str(path)!r} does not exist")
    net = work.network(stage)
    images = _checked(
        lambda: work.setting.generate(net, args.steps, args.n, args.seed, args.solver, work.run.eval.batch)
    )
    labels = work.setting.labels(torch.arange(args.n))
    if args.out:
        with open(args.out, "wb") as file:
            np.savez(
                file, images=images.numpy(), labels=(torch.zeros(args.n) if labels is None else labels).long().numpy()
            )
        print(f"{args.out}: {args.n} samples of {args.stage}, {args.steps} steps, seed {args.seed}")
    if args.grid:
        shown = images if images.ndim == 2 else images[:100]
        rows = [shown] if images.ndim == 2 else shown.split(10)
        pictures.grid(
            [(f"{args.steps} step{'s' * (args.steps > 1)}" if i == 0 else "", r) for i, r in enumerate(rows)], args.grid
        )
        print(f"{args.grid}: a picture of them")


def _checked(call):
    try:
        return call()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def evaluate(args: argparse.Namespace) -> None:
    work, stage = ws.open_stage(args.stage)
    try:
        steps = tuple(int(s) for s in args.steps.split(","))
    except ValueError:
        raise ConfigError(f"--steps: {args.steps!r} is not a list of numbers like 1,2") from None
    if min(steps) < 1 or (args.n is not None and args.n < 2):
        raise ConfigError("--steps and --n: must be at least 1 and 2")
    net, n = work.network(stage), args.n or work.run.eval.n
    figures = _checked(lambda: work.evaluate(net, steps, n, args.solver, args.seed))
    out = {"stage": args.stage, "n": n, "extractor": work.space.name, "solver": args.solver, "steps": figures}
    if args.json:
        print(json.dumps(out, indent=1))
        return
    print(f"{args.stage}: {n} samples, features {work.space.name}")
    for k, row in figures.items():
        print(f"{k:>4} steps  " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))


def make_report(args: argparse.Namespace) -> None:
    report.write(args.run)


def run_search(args: argparse.Namespace) -> None:
    search.run(args.recipe, args.stage, args.overrides, args.grid, args.out, args.record)


def run_theory(args: argparse.Namespace) -> None:
    figures = theory.measure()
    print(theory.as_text(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


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
            work = ws.Workspace(config.load(name), Path("."))
            print(f"{name}: valid, {config.digest(work.run)[:12]}")


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


def doctor(args: argparse.Namespace) -> None:
    for key, value in ws.environment().items():
        print(f"{key:10s} {value}")
    for op in cmt_kernels.OPS:
        print(f"op {op:18s} {' > '.join(cmt_kernels.available(op))}")
    print(f"recipes    {', '.join(config.recipes())}")
