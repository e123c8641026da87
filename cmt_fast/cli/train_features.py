"""`cmt train-features`: the classifier of latents behind the distance `latent_lpips`, on one process or several."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import datasets, start
from cmt_fast.perceptual import classifier
from cmt_fast.runtime import distributed, machine


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=train_features)
    p.add_argument("recipe", help="name or YAML file; its data, seed and `features` are read")
    add_overrides(p)
    p.add_argument("--out", type=Path, required=True, help="folder of the classifier; it gets latent_vgg.safetensors")


def train_features(args: argparse.Namespace) -> None:
    run = loading.load(args.recipe, args.overrides)
    device = machine.device(run.device)
    distributed.start(device, run.timeout_s)
    try:
        with start.together(copy=True):
            data = datasets.load(run.data)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    classifier.train(run, data, args.out, device)
