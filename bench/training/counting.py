"""`python -m bench launches`: the kernels of a training step, counted without a GPU, of a DiT (launches.py) or of EDM2s, whose
names begin with `EDM2-` (unet_launches.py). All times are PREDICTED."""

from __future__ import annotations

import argparse

from bench.training import launches, unet_launches, unets

add_arguments = launches.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the JSON."""
    return (unet_launches if arguments.model.startswith(unets.PREFIX) else launches).run(arguments)
