"""`cmt doctor`: what this machine has."""

from __future__ import annotations

import argparse
from pathlib import Path

import cmt_kernels
import torch
from cmt_kernels import _native, assembler

from cmt_fast.config import recipes
from cmt_fast.data import dali
from cmt_fast.run import needs
from cmt_fast.runtime import machine, watchdog
from cmt_fast.storage import heartbeat

EXTRAS = {  # of pyproject.toml: what each brings, by the names that are imported
    "demo": ("sklearn", "skimage"),
    "eval": ("torch_fidelity",),
    "log": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "latents": ("diffusers",),
    "dali": ("nvidia.dali",),
    "zero": ("deepspeed",),
    "energy": ("pynvml",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "completion": ("shtab",),
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=doctor)
    p.add_argument(
        "--heartbeat", type=Path, metavar="RUN", help="check only whether RUN, or a run in it, is alive; fail otherwise"
    )
    p.add_argument(
        "--older-than",
        type=float,
        default=heartbeat.DEAD_S,
        metavar="S",
        help="oldest heartbeat that counts as alive, in seconds",
    )


def doctor(args: argparse.Namespace) -> None:
    if args.heartbeat:
        age = heartbeat.age(args.heartbeat)
        if age is None or age > args.older_than:
            ago = "has never been alive" if age is None else f"last gave a sign of life {age:.0f} s ago"
            late = "; ".join(watchdog.late(args.heartbeat))  # who hung, or died first
            late = f" ({late})" if late else ""
            raise OSError(f"{args.heartbeat}: {ago}, at most {args.older_than:.0f} s are allowed{late}")
        return print(f"{args.heartbeat}: alive {age:.0f} s ago")
    for key, value in machine.environment().items():
        print(f"{key:10s} {value}")
    _assemblers()
    print(f"dali       {dali.version() or 'not installed'}")
    print(f"kernels    {cmt_kernels.__version__} in {Path(cmt_kernels.__file__).parent}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"native     {_native.unavailable(kind) or _native.record().get('line', 'loaded')}")
    if line := machine.other_kernels():
        print(f"note       {line}")
    _extras()
    for op in cmt_kernels.OPS:
        print(f"op {op:18s} {' > '.join(cmt_kernels.available(op))}")
    print(f"recipes    {', '.join(recipes.recipes())}")


def _extras() -> None:
    """Which extras are here, and how the others are had."""
    lacking = {extra for extra, modules in EXTRAS.items() if not all(map(needs.installed, modules))}
    print(f"extras     {', '.join(extra for extra in EXTRAS if extra not in lacking) or 'none'}")
    if lacking:
        print(f"not here   {', '.join(extra for extra in EXTRAS if extra in lacking)}; pip install 'cmt-fast[EXTRA]'")


def _assemblers() -> None:
    """What could assemble Triton's kernels here, which does (without a GPU: for an H100), and why attention refuses it."""
    card = assembler.card() or assembler.WGMMA
    choice = assembler.choose(card)
    for found in assembler.candidates():
        taken = choice.assembler and found.path == choice.assembler.path
        print(f"ptxas      {found.version_text} at {found.path}{f' (for sm_{card}, {choice.why})' if taken else ''}")
    if not choice.assembler or assembler.refusal(card):
        print(f"ptxas      {assembler.refusal(card) or choice.why}")
