"""What a rank holds at its start, in a step, at a save and at an evaluation, beside what the sizing says it would.

For the local engine and ZeRO 0 to 3 on several numbers of CPU processes: the most memory of any rank above what it had
before the engine, in units of P, one fp32 copy of the weights. The network is a DiT large enough for its activations on one
row to be small beside its weights. `VmHWM` is reset before each phase, and blocks of 64 KB and more are given back to the
system when they are freed, so that a peak is of what was held and not of what the allocator kept.

Also the weights: those at the start and after two steps, their checksums over engines, stages and numbers of ranks. And the
same sizing for the largest published networks, counted up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from bench.harness import results_file
from bench.training.zero import Setting, launch
from cmt_fast.config import loading
from cmt_fast.engine import Unread, sharding
from cmt_fast.run.networks import deferred_network, shapes_of
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, machine
from cmt_fast.storage import checkpoint

PHASES = sharding.PHASES
STEPS = 2
# a network of about 60 MB whose rows are 4 tokens
MODEL = ["model.width=512", "model.depth=3", "model.heads=8", "model.patch=4"]
EDM2 = ["model={kind: edm2, width: 96, multipliers: [1, 2], blocks: 2, attention: [4], head: 32}"]
LARGE = {"EDM2-XXL": ("imagenet512-ecd", ["model.size=XXL"]), "DiT-XL/2": ("imagenet256-mf", ["model.size=XL"])}


def measured(overrides: list[str], teacher: bool, file: Path) -> Callable[[], None]:
    """A group's work: one engine through its phases; rank 0 writes to `file` what all ranks have seen."""

    def work() -> None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
        _phases(
            overrides + ["model.width=32"], teacher, file
        )  # imports, threads and buffers of libraries are no weights
        space, plan, peaks, sums = _phases(overrides, teacher, file)
        seen = distributed.every_rank([float(peaks[phase]) for phase in PHASES])
        if distributed.rank() == 0:
            most = {phase: max(row[i] for row in seen) for i, phase in enumerate(PHASES)}
            about = {
                "bytes": most,
                "sizing": plan.peaks.phases(),
                "parameters": space.parameters,
                "sums": sums,
            }
            file.write_text(json.dumps(about))

    return work


def _phases(overrides: list[str], teacher: bool, file: Path) -> tuple[Workspace, sharding.ShardingPlan, dict, dict]:
    """One engine from its start to an evaluation: bytes of this rank above what it had before, checksums of its weights."""
    space = Workspace(loading.load("digits", overrides), file.with_suffix(""))
    stage = space.stage("pre")
    plan = space.sharding_plan(stage, teacher_parameters=space.parameters if teacher else None)
    batch, peaks, save = _batch(space), {}, file.with_suffix(".save")
    _reset()
    base = _memory("VmRSS")
    engine = space.engine_of(stage, 1, plan)
    frozen = engine.frozen(_unread(space)) if teacher else None
    peaks["start"] = _memory("VmHWM") - base
    sums = {"start": _checksum(engine.state()["model"])}
    _reset()
    for n in range(STEPS):
        target: Any = 0.0
        if frozen is not None:
            with torch.no_grad():
                target = frozen(*batch)
        engine.backward((engine(*batch) - batch[0].sin() - target).square().mean())
        engine.step(1e-4 * (n + 1))
    peaks["step"] = _memory("VmHWM") - base
    sums["end"] = _checksum(engine.state()["model"])
    _reset()
    checkpoint.save(save, STEPS, engine.state(), {}, write=distributed.rank() == 0)
    distributed.barrier()
    peaks["save"] = _memory("VmHWM") - base
    _reset()
    with torch.no_grad():
        engine.average()(*batch)
    peaks["evaluation"] = _memory("VmHWM") - base
    if distributed.rank() == 0:
        shutil.rmtree(save, ignore_errors=True)
    return space, plan, peaks, sums


def _unread(space: Workspace) -> Unread:
    """A teacher of the student's size, whose weights are made as they are asked for."""
    net = deferred_network(space.run, space.data.shape, space.data.classes).net
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    return Unread(net, checkpoint.Tensors(shapes, lambda name: torch.full(shapes[name], 1e-3)))


def _batch(space: Workspace) -> tuple[Tensor, ...]:
    """One row of this rank's own."""
    random = torch.Generator().manual_seed(distributed.rank())
    x, t = torch.randn(1, *space.data.shape, generator=random), torch.tensor([0.7])
    return x, t, t, torch.tensor([distributed.rank() % space.data.classes])


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _reset() -> None:
    """The peak of this process begins anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of all tensors by sorted name; one is fetched after the other."""
    sum_ = xxhash.xxh3_128()
    for name in sorted(tensors):
        sum_.update(tensors[name].detach().contiguous().numpy().tobytes())
    return sum_.hexdigest()


def table(folder: Path, every: list[Setting], model: list[str], teacher: bool, write: Callable[[dict], None]) -> dict:
    """{setting: {"measured", "sizing": {phase: units of P}, "sums"}}; write: is given it after every setting."""
    out = {}
    for setting in every:
        file = folder / f"{setting.name}.json"
        sharded = ["zero_teacher=sharded"] if teacher and setting.stage == 3 and setting.processes > 1 else []
        launch(setting.processes, measured([*setting.overrides, *model, *sharded], teacher, file), folder)
        row = json.loads(file.read_text())
        unit = 4 * row["parameters"]
        out[setting.name] = {
            "measured": {phase: round(row["bytes"][phase] / unit, 3) for phase in PHASES},
            "sizing": {phase: round(row["sizing"][phase] / unit, 3) for phase in PHASES},
            "sums": row["sums"],
            "parameters": row["parameters"],
        }
        print(setting.name, _line(out[setting.name]), flush=True)
        write(out)
    return out


def _line(row: dict[str, Any]) -> str:
    both = (f"{phase} {row['measured'][phase]:.2f} ({row['sizing'][phase]:.2f})" for phase in PHASES)
    return ", ".join(both) + f"; start {row['sums']['start'][:6]}, end {row['sums']['end'][:6]}"


def worst(tables: list[dict[str, dict[str, Any]]]) -> float:
    """The largest relative error of the sizing."""
    pairs = ((row["sizing"][p], row["measured"][p]) for t in tables for row in t.values() for p in PHASES)
    return max(abs(a / b - 1) for a, b in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--worlds", default="1,2,4,8", help="numbers of processes (default: 1,2,4,8)")
    parser.add_argument("--only", default="", help="settings by name, as zero3-4; all by default")
    parser.add_argument("--cases", default="plain,teacher,edm2", help="what is measured")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401  once, before the forks
    import torch._dynamo  # noqa: F401

    worlds = [int(n) for n in arguments.worlds.split(",")]
    every = [Setting(s, n) for n in worlds for s in (None, 0, 1, 2, 3)]
    every = [s for s in every if not arguments.only or s.name in arguments.only.split(",")]
    folder, figures = Path(tempfile.mkdtemp(prefix="ranks-")), {}
    cases = {"plain": (every, MODEL, False), "teacher": (every, MODEL, True), "edm2": (every, EDM2, False)}
    figures["counted"] = {name: counted(recipe, model) for name, (recipe, model) in LARGE.items()}
    about = results_file.about("cpu") | {"environment": machine.environment(), "steps": STEPS}

    def write(case: str, rows: dict) -> None:
        figures[case] = rows
        if arguments.out:
            arguments.out.write_text(json.dumps(about | figures, indent=1) + "\n")

    try:
        for case in arguments.cases.split(","):
            print(f"{case}:")
            table(folder, *cases[case], lambda rows, case=case: write(case, rows))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"the sizing is off by at most {worst([figures[c] for c in arguments.cases.split(',')]):.1%}")
    return 0


def counted(recipe: str, model: list[str]) -> dict[str, Any]:
    """GB of a process at each phase, by the sizing, for a published network on ImageNet's latents; nothing is measured."""
    run, shape = loading.load(recipe, [*model, "device=cpu"]), (4, 64, 64) if "512" in recipe else (4, 32, 32)
    size = sharding.measure(shapes_of(run, shape, 1000))._replace(tracks=1)
    rows = {
        f"{'local' if stage is None else f'zero{stage}'}-{n}": {
            phase: round(x / 1e9, 1) for phase, x in sharding.peaks(stage, size, n).phases().items()
        }
        for stage in (None, 0, 1, 2, 3)
        for n in (1, 2, 4, 8)
    }
    return {"parameters": size.parameters, "gb": rows}
