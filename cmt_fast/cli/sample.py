"""`cmt sample`: samples of a trained stage as a folder of PNGs, as arrays, and as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.cli.parser import checked
from cmt_fast.config.errors import ConfigError
from cmt_fast.run import pictures, samples, telling
from cmt_fast.runtime import distributed, machine

PICTURES = ("grid", "interpolate", "strip")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=sample)
    p.add_argument("stage", metavar="RUN/STAGE", help="a stage of a run, such as runs/digits/post")
    p.add_argument("--steps", type=int, help="network calls (default: 1; of the solver sampler.teacher_steps)")
    p.add_argument("-n", "--samples", "--n", dest="n", type=int, default=64, help="samples (default: 64)")
    p.add_argument(
        "--first", type=int, default=0, metavar="I", help="index of the first: an image alone is --first I -n 1"
    )
    p.add_argument(
        "--class", "--classes", dest="classes", metavar="A,B", help="of these alone, by number or name, in equal parts"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    p.add_argument("--solver", action="store_true", help="integrate the ODE, as a diffusion model is sampled")
    p.add_argument(
        "--guidance",
        metavar="W[,V...]",
        help="of the solver, which it implies for a diffusion model, in place of the recipe's; what a network with "
        "model.guided is told, several in turn",
    )
    p.add_argument("--batch", type=int, default=0, help="samples at a time (default: eval.batch)")
    p.add_argument(
        "--out",
        metavar="FOLDER/|FILE.npz",
        help="PNGs 000000.png ... in a folder, or one .npz; rerun to resume, over ranks with torchrun",
    )
    p.add_argument(
        "--format",
        choices=samples.FORMATS,
        help="of an .npz: arrays (default): images (N, C, H, W) float32 in data units, labels; adm: arr_0 (N, H, W, 3) uint8, "
        "arr_1 labels, as ADM's evaluator reads them",
    )
    p.add_argument("--grid", type=Path, metavar="FILE.png", help="a picture of the first 100 samples")
    p.add_argument(
        "--interpolate", type=Path, metavar="FILE.png", help="from one sample's noise to another's, a row a pair"
    )
    p.add_argument("--strip", type=Path, metavar="FILE.png", help="the same noise through 1, 2, 4, 8 steps, a row each")
    p.add_argument("--strip-steps", metavar="K,L", help="other numbers of steps for --strip")
    p.add_argument("--decode", action="store_true", help="latents: write images (N, 3, H, W) uint8 instead")
    p.add_argument("--vae", metavar="FOLDER_OR_ID", help="the autoencoder (default: the one that the store names)")


def sample(args: argparse.Namespace) -> None:
    if args.steps is not None and args.steps < 1:
        raise ConfigError("--steps: must be at least 1")
    steps = _strip_steps(args)
    if args.format and not args.out:
        raise ConfigError("--format: goes with --out")
    out = args.out
    if out:
        samples.kind_of(out, args.format)
    for key in PICTURES:
        path = getattr(args, key)
        if path and (path.suffix.lower() != ".png" or path.is_dir()):
            raise ConfigError(f"--{key}: {str(path)!r} is no file .png")
        if path and not path.parent.is_dir():
            raise ConfigError(f"--{key}: the folder of {str(path)!r} does not exist")
    if args.interpolate and args.n < 2:  # before any is drawn
        raise ConfigError(f"--interpolate: goes from one sample to another, and --n is {args.n}")
    distributed.start(machine.device("auto"))
    request = samples.Request(args.n, args.steps or 0, args.seed, args.first, args.solver, args.batch)
    scales = telling.scales(args.guidance) if args.guidance is not None else None
    asked = samples.Asked(args.classes, scales, args.decode, args.vae)
    drawing = checked(lambda: samples.opened(args.stage, request, asked))
    if not out and not any(getattr(args, key) for key in PICTURES):
        args.grid = Path(f"{drawing.work.run.name}-{drawing.stage}.png")
    if out:
        said = samples.save(drawing, out, args.format)
        if distributed.rank() == 0:
            print(said)
    if distributed.rank() == 0:
        _pictures(args, drawing, steps)


def _strip_steps(args: argparse.Namespace) -> tuple[int, ...] | None:
    if args.strip_steps is None:
        return None
    if not args.strip:
        raise ConfigError("--strip-steps: goes with --strip")
    return pictures.steps_of(args.strip_steps)


def _pictures(args: argparse.Namespace, drawing: samples.Drawing, steps: tuple[int, ...] | None) -> None:
    """Those that are asked for, and a line each."""

    def say(path: Path, note: str, text: str) -> None:
        without = ", without the autoencoder" if drawing.work.decoding.latents else ""
        print(f"{path}: {text}{f' ({note} channels{without})' if note else ''}")

    r = drawing.request
    if args.grid:
        few = f"{min(r.n, samples.SHOWN):,} of {args.stage}, {drawing.how}; labels {drawing.setting.law.text()}"
        say(args.grid, pictures.grid(drawing, args.grid), "a picture of them" if args.out else f"a picture of {few}")
    if args.interpolate:
        pairs = min(pictures.PAIRS, r.n // 2)
        text = f"{pairs} pair{'s' * (pairs > 1)} of samples, the noise between them along the sphere, {drawing.how}"
        say(args.interpolate, pictures.interpolation(drawing, args.interpolate), text)
    if args.strip:
        note, left = pictures.strip(drawing, args.strip, steps)
        say(args.strip, note, "the same noise through more and more steps")
        for line in left:
            print(f"not in it: {line}")
