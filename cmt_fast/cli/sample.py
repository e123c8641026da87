"""`cmt sample`: samples of a trained stage as arrays and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from cmt_fast.cli.parser import checked
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import classes
from cmt_fast.diffusion.labels import Law
from cmt_fast.render import grids
from cmt_fast.run import guidance, workspace


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=sample)
    p.add_argument("stage", metavar="RUN/STAGE")
    p.add_argument("--steps", type=int, default=1, help="network calls (default: 1)")
    p.add_argument("-n", "--samples", "--n", dest="n", type=int, default=64, help="samples (default: 64)")
    p.add_argument(
        "--class", "--classes", dest="classes", metavar="A,B", help="of these alone, by number or name, in equal parts"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    p.add_argument("--solver", action="store_true", help="integrate the ODE, as a diffusion model is sampled")
    p.add_argument("--out", type=Path, help="images (N, C, H, W) float32 in data units, labels (N,)")
    p.add_argument("--grid", type=Path, help="a PNG of the first samples")
    p.add_argument("--decode", action="store_true", help="latents: write images (N, 3, H, W) uint8 instead")
    p.add_argument("--vae", metavar="FOLDER_OR_ID", help="the autoencoder (default: the one that the store names)")


def sample(args: argparse.Namespace) -> None:
    work, stage = workspace.open_stage(args.stage, rows=False)
    if args.steps < 1 or args.n < 1:
        raise ConfigError(f"--{'steps' if args.steps < 1 else 'n'}: must be at least 1")
    work.setting.check_steps((args.steps,), args.solver, "--steps")
    if not args.out and not args.grid:
        raise ConfigError("cmt sample: nothing to write; give --out FILE.npz, --grid FILE.png or both")
    for path in (args.out, args.grid):
        if path and not path.parent.is_dir():
            raise ConfigError(f"--{'out' if path is args.out else 'grid'}: the folder of {str(path)!r} does not exist")
    if args.vae and not args.decode:
        raise ConfigError("--vae: goes with --decode")
    codec = work.decoding.codec(args.vae) if args.decode else None
    if args.solver:
        guidance.check_solver(work.place, stage)
    setting = work.setting
    if args.classes is not None:
        if not getattr(work.run.model, "conditional", True):
            raise ConfigError("--classes: the network takes no labels (model.conditional false)")
        chosen = torch.tensor(classes.by_name(work.data, args.classes))
        setting = setting.under(Law.uniform(chosen, work.data.classes))
    net = work.network(stage)
    images = checked(lambda: setting.generate(net, args.steps, args.n, args.seed, args.solver, work.run.eval.batch))
    labels = setting.labels(torch.arange(args.n))
    if codec:  # bytes as soon as they are decoded: fp32 images of thousands of latents would not fit
        images = torch.cat([_bytes(codec.decode(part)) for part in images.split(64)])
    if args.out:
        numbers = (torch.zeros(args.n) if labels is None else labels).long().numpy()
        with open(args.out, "wb") as file:
            np.savez(file, images=images.numpy(), labels=numbers)
        print(
            f"{args.out}: {args.n} samples of {args.stage}, {args.steps} step{'s' * (args.steps > 1)}, seed {args.seed}"
            f"; labels {setting.law.text()}"
        )
    if args.grid:
        shown = images if images.ndim == 2 else images[:100]
        shown, note = (shown / 127.5 - 1, "") if codec else work.decoding.visible(shown)
        rows = [shown] if images.ndim == 2 else shown.split(10)
        title = f"{args.steps} step{'s' * (args.steps > 1)}\n{note}"
        grids.grid([(title if i == 0 else "", r) for i, r in enumerate(rows)], args.grid)
        without = ", without the autoencoder" if work.decoding.latents else ""
        print(f"{args.grid}: a picture of them{f' ({note} channels{without})' if note else ''}")


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().byte()
