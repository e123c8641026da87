"""`python -m bench WHAT ...`: a bench is a module with `add_arguments(parser)` and `run(arguments) -> exit status`.

Only the bench that is asked for is imported: the ops are measured on machines that lack what the trainer needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys

# name: its module, what it measures
BENCHES = {
    "audit": ("harness.audit", "known faults of every package that is installed, by pip-audit; needs a network"),
    "calibrate": (
        "kernels.calibrate",
        "what this machine does at its best: ceilings, linears, attention, norms, optimizers",
    ),
    "coverage": ("harness.coverage", "lines of every room of cmt_fast that the tests ran"),
    "crashes": (
        "safety.crashes",
        "every state in which a crash can leave a save: writes lost or torn before they are synced, and what is loaded then",
    ),
    "damage": (
        "safety.damage",
        "bits that flip in every file of a run, cuts, swaps, edits, pipes, folders: what sees them, and what goes on",
    ),
    "diskfull": (
        "safety.diskfull",
        "a run on a full disk at 200 sizes, and on file systems that refuse flock, syncs, renames or links",
    ),
    "dual": ("training.dual", "what a tangent costs, beside the plain forward and torch.func.jvp"),
    "fuzz": (
        "safety.fuzz",
        "readers of foreign files fuzzed: declared errors only, and nothing executed, written, connected to",
    ),
    "gallery": (
        "experiments.gallery",
        "docs/gallery.md: runs of the small recipes, their minutes, figures and pictures",
    ),
    "gates": ("kernels.resources", "registers, spills and shared memory of every kernel, compiled without a GPU"),
    "gpu": ("harness.gpu_suite", "all that a machine with a GPU is for, in parts"),
    "grid": (
        "grid.command",
        "every objective from scratch, from pre, from mid and anchored, at equal images and at equal forwards, over seeds",
    ),
    "judging": (
        "judging.judging",
        "moments, Fréchet distance, precision and recall of 50,000 x 2,048 features: CPU seconds and peak memory",
    ),
    "kills": (
        "safety.kills",
        "SIGKILLs at random moments of training, on one rank and two: what is left, and whether the end is the same",
    ),
    "kit": ("harness.kit", "a folder that a machine with torch and triton runs with no network"),
    "launches": (
        "training.counting",
        "kernels that a training step launches on a GPU, counted without one: kinds, bytes, predicted times",
    ),
    "leaks": (
        "safety.leaks",
        "stage after stage in one process beside each in its own: bits, and what is left behind, over ranks and engines",
    ),
    "licences": ("harness.pages.licences", "docs/licences.json: what every installed package says of its licence"),
    "loader": ("training.loader", "rows a second of every loader, against what a training step takes"),
    "metrics": (
        "training.metrics",
        "what a long metrics.jsonl costs: a report, the start of a stage, `cmt watch`, `cmt runs`; CPU seconds and memory",
    ),
    "modes": (
        "experiments.modes",
        "mid-training from trajectories in paper mode, in a pool and from a cache, over several seeds",
    ),
    "nodes": (
        "training.nodes",
        "a run on two nodes that lose ranks, nodes and time, by the SLURM file itself on one machine",
    ),
    "nonfinite": (
        "safety.nonfinite",
        "NaN in a loss, gradient or tangent of one rank of two: both decide alike, nothing changes, the layer is named",
    ),
    "ops": ("kernels.ops", "times of every op, backend and case"),
    "pipeline": ("training.pipeline", "what the trainer loses around its steps"),
    "plan": ("training.plans", "`cmt plan` on three kinds of machine, and its count of activations beside a card's"),
    "precisions": ("experiments.precisions", "a recipe in fp32, bf16 and bf16-stream: losses and figures"),
    "predict": (
        "training.predict",
        "what a GPU's ceilings allow each op and step: predicted, for machines without one",
    ),
    "proofs": ("kernels.proofs", "what attention's proof at first use costs, of the recipes' networks"),
    "ranks": (
        "training.ranks",
        "what a rank holds at its start, in a step, at a save and at an evaluation, beside what the sizing says",
    ),
    "report": ("harness.tables", "write the README's tables from bench/results"),
    "restart": (
        "training.restart",
        "bytes and processor seconds of a restart, and the stall of a save, on CPU processes; counted up to an XXL",
    ),
    "resume": (
        "safety.resume",
        "going on from each of 40 steps of every stage: bits; rows of an epoch over changing numbers of processes",
    ),
    "rounding": (
        "experiments.rounding",
        "consistency post-training in 16 bits by the measured rule: ratios, gradients, figures beside fp32",
    ),
    "seeds": ("experiments.seeds", "a recipe over several seeds"),
    "signals": (
        "safety.signals",
        "56 signals to commands at all kinds of moments: exit codes, seconds to the end, what is on disk",
    ),
    "soak": (
        "safety.soak",
        "20,000 steps with saves, evaluations and grids in one process: what grows",
    ),
    "sweep": ("kernels.sweep", "attention over tokens and head dims beside float64, crash by crash"),
    "step": ("training.step", "whole training steps, eager and compiled, beside the published codes' way"),
    "trajectories": ("training.trajectories", "teacher rollouts, by how many run at once"),
    "train": ("training.train", "both digits recipes to their report, and the figures of every stage"),
    "tune": (
        "experiments.tune",
        "the solver that is chosen by measurement, and the mid-trainings that confirm or refute it",
    ),
    "unet": ("training.unet", "training steps of an EDM2 in the ImageNet-512 recipe, by kernel on a GPU"),
    "worth": (
        "experiments.worth",
        "solvers that a budget of forwards chooses, beside the gradient's bias that each choice really has, in a known world",
    ),
    "zero": (
        "training.zero",
        "loss curves and checkpoints of every ZeRO stage beside the local engine's, on CPU processes",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measurements; JSON goes to bench/results.")
    what = parser.add_subparsers(dest="what", required=True)
    asked = next((a for a in sys.argv[1:] if a in BENCHES), None)
    module = importlib.import_module(f"bench.{BENCHES[asked][0]}") if asked else None
    for name, (_, text) in BENCHES.items():
        sub = what.add_parser(name, help=text, description=module.__doc__ if name == asked else text)
        if name == asked:
            module.add_arguments(sub)
    arguments = parser.parse_args()
    return module.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
