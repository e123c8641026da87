"""Everything a machine with a GPU is for, in parts of under ten minutes each: tests, calibration, ops, steps, a training.

Runs from the repository root with nothing installed from it. A part whose packages are missing says which, and the others
run all the same. Results go to $OUT where OUT is set, else to bench/results/<device>/.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import ROOT, about, save

TRAINER = ("numpy", "pydantic", "yaml", "safetensors", "xxhash", "rich", "PIL", "jinja2")
PARTS = {
    "tests": ("pytest",),
    "calibrate": ("numpy",),
    "ops": ("numpy",),
    "step": TRAINER,
    "step-xl1024": TRAINER,
    "step-b256": TRAINER,
    "step-b1024": TRAINER,
    "step-l256": TRAINER,
    "step-ve": TRAINER,
    "trajectories": TRAINER,
    "pipeline": (*TRAINER, "sklearn"),
    "train": (*TRAINER, "sklearn", "matplotlib"),
}
LIMIT_S = 580.0
SHORT = [
    "model.width=16", "model.depth=1", "model.heads=2", "eval.n=200", "eval.n_during=100",
    "pre.images_nimg=320", "pre.batch=32", "pre.warmup_nimg=0",
    "mid.images_nimg=320", "mid.batch=32", "mid.warmup_nimg=0", "mid.trajectories.pool_steps=4",
    "post.images_nimg=320", "post.batch=32", "post.trajectories.pool_steps=4",
    "control.images_nimg=320", "control.batch=32",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all of them if absent")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small shapes, all code paths")


def missing(part: str) -> list[str]:
    """Packages that a part needs and this Python has not."""
    return [name for name in PARTS[part] if importlib.util.find_spec(name) is None]


def call(limit_s: float, *arguments: str) -> int:
    """`python ARGUMENTS` from the repository root; its exit code, 124 if it ran out of time."""
    command = [sys.executable, *arguments]
    print("$", " ".join(command), flush=True)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        return subprocess.run(command, cwd=ROOT, env=env, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit_s:.0f} s", flush=True)
        return 124


def tests(device: str, tiny: bool) -> int:
    """The tests marked gpu, in several processes where pytest-xdist is there; in a dry run the dispatch's own."""
    if tiny:
        return call(LIMIT_S, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_dispatch.py")
    where = "tests" if not missing("train") else "tests/kernels"
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    if where != "tests":
        print(f"tests/kernels alone: the trainer's tests need {', '.join(missing('train'))}", flush=True)
    return call(LIMIT_S, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *spread, where)


def calibrate(device: str, tiny: bool) -> int:
    """Ceilings, linears, attention, ops with tangents, optimizers."""
    return call(LIMIT_S, "-m", "bench", "calibrate", "--device", device, *(["--tiny", "--seconds", "0.01"] * tiny))


def ops(device: str, tiny: bool) -> int:
    """Every op's row beside the reference and the compiled reference."""
    how = ["--batch", "1", "--seconds", "0.01"] if tiny else ["--batch", "64", "--seconds", "0.3", "--compile"]
    return call(LIMIT_S, "-m", "bench", "ops", "--device", device, *how)


def step(device: str, tiny: bool, model: str = "XL256", objectives: tuple[str, ...] = ("FM", "CMT-MF", "MF")) -> int:
    """Training steps of one network beside the peer's. Inductor takes minutes for an XL, so each shape is a part."""
    how = ["--model", model, *(f"--objective={name}" for name in objectives)]
    return call(LIMIT_S, "-m", "bench", "step", "--device", device, *(["--tiny", "--seconds", "0.01"] if tiny else how))


def trajectories(device: str, tiny: bool) -> int:
    """Teacher rollouts by how many run at once, in one CUDA graph too."""
    how = ["--tiny", "--seconds", "0.01"] if tiny else ["--model", "B256", "--model", "XL256"]
    return call(LIMIT_S, "-m", "bench", "trajectories", "--device", device, *how)


def pipeline(device: str, tiny: bool) -> int:
    """What the loop loses around its steps."""
    code = call(LIMIT_S, "-m", "bench", "pipeline", "--device", device, *(["--tiny"] if tiny else ["--steps", "400"]))
    return code if importlib.util.find_spec("nvidia.dali") else 0  # it is 1 for the want of DALI alone


def train(device: str, tiny: bool) -> int:
    """digits-mf from noise to a report; the last figures of each stage are kept."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        overrides = [f"device={device}", *(SHORT if tiny else [])]
        code = call(LIMIT_S, "-m", "cmt_fast", "train", "digits-mf", "--out", folder, *overrides)
        stages = {}
        for file in sorted(Path(folder).glob("*/metrics.jsonl")):
            rows = [json.loads(row) for row in file.read_text("utf-8").splitlines()]
            stages[file.parent.name] = {row["kind"]: row for row in rows}  # the last of each kind
        results = about(device) | {"tiny": tiny, "exit": code, "seconds": time.perf_counter() - begun, "stages": stages}
        print("written to", save("train", device, results))
    return code


FUNCTIONS = {
    "tests": tests,
    "calibrate": calibrate,
    "ops": ops,
    "step": step,
    "step-xl1024": functools.partial(step, model="XL1024"),
    "step-b256": functools.partial(step, model="B256"),
    "step-b1024": functools.partial(step, model="B1024"),
    "step-l256": functools.partial(step, model="L256"),
    "step-ve": functools.partial(step, model="B256", objectives=("CMT-CM", "ECT", "ECD")),
    "trajectories": trajectories,
    "pipeline": pipeline,
    "train": train,
}


def run(arguments: argparse.Namespace) -> int:
    """Run the parts in order, all of them whatever one of them did; 1 if one failed or could not run."""
    for part in arguments.part:
        if part not in PARTS:
            raise SystemExit(f"gpu: {part!r} is not valid; valid are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: this machine has no CUDA device; `make gpu-dry` runs the same parts on a CPU")
    summary = {}
    for part in arguments.part or [name for name in PARTS if not (arguments.tiny and "-" in name)]:
        begun, lacks = time.perf_counter(), missing(part)
        if lacks:
            summary[part] = f"NOT RUN: needs {', '.join(lacks)}"
        else:
            code = FUNCTIONS[part](arguments.device, arguments.tiny)
            summary[part] = (
                f"{'ok' if code == 0 else f'FAILED, exit code {code}'} in {time.perf_counter() - begun:.0f} s"
            )
        print(f"== {part}: {summary[part]}", flush=True)
    print("\n".join(f"{part:10} {text}" for part, text in summary.items()))
    return int(not all(text.startswith("ok") for text in summary.values()))
