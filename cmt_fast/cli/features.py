"""`cmt train-features`: the classifier of latents behind the distance `latent_lpips`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast import classifier, config, distributed, machine
from cmt_fast import data as datasets
from cmt_fast.cli.parser import Command
from cmt_fast.config import ConfigError


def add(command: Command) -> None:
    """Declare these commands."""
    text = "train the classifier behind the distance latent_lpips on a recipe's data; the same command again goes on"
    p = command("train-features", train_features, text)
    p.add_argument("recipe", help="name or YAML file; its data, seed and `features` are read")
    p.add_argument("overrides", nargs="*", metavar="a.b=value")
    p.add_argument("--out", type=Path, required=True, help="folder of the classifier; it gets latent_vgg.safetensors")


def train_features(args: argparse.Namespace) -> None:
    run = config.load(args.recipe, args.overrides)
    device = machine.device(run.device)
    distributed.start(device)
    try:
        data = datasets.load(run.data)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    classifier.train(run, data, args.out, device)
