"""`python -m bench launches`: the kernels that a training step of ours launches on a GPU, counted without one.

The step is the trainer's own, forward, loss, backward and optimizer of an objective at its true shapes, on fake tensors: no
memory, no arithmetic. Its ops run as on a GPU (native, else Triton) as far as the kernel. Of each launch: what it is, whose
tensor it makes, bytes read and written and FLOPs of products; PREDICTED GPU time is the larger of bytes over a copy's rate and
FLOPs over a matmul's, as measured on the card: at least so much, no latency. Predicted host time: launches times the host
microseconds a launch of BASELINE, where steps of the card were measured on the tree that was counted there.

Left out: rows of the loader and of the pool of trajectories, the dropping of labels, logging, checkpoints. Autocast is the
CPU's, which casts the same operands of a DiT.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import OPS, through
from cmt_kernels.cases import implementation
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.harness.results_file import ROOT, about, write_json
from bench.training import runs, unets
from bench.training.launch_trace import Launch, Sizes, Trace
from cmt_fast import models
from cmt_fast.config.schema import Stage
from cmt_fast.cost import hardware
from cmt_fast.cost.hardware import Card
from cmt_fast.diffusion.rng import Random
from cmt_fast.engine import LocalEngine
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points
from cmt_fast.objectives.meanflow import tangent_rows

MEASURED = ROOT / "bench" / "results"
TARGET = MEASURED / "predicted" / "launches.json"
BASELINE = TARGET.with_name("launches-baseline.json")  # of the models and kernels that h100/step.json timed
CHOICES = ("FM", "MF", "CMT-MF")
PRECISIONS = ("bf16", "bf16-stream", "fp32")
SPLIT = (
    "cast up",
    "cast down",
    "add",
    "fill",
    "reduction",
    "cat",
    "copy",
)  # kinds that are told apart by whose tensor they make
KEYS = ("part", "kind", "op", "what", "dtypes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--objective", action="append", choices=(*CHOICES, *unets.STAGES), help="default: all that the model has"
    )
    parser.add_argument(
        "--model",
        default="XL256",
        help=f"{', '.join(runs.SMALL)} or a size and its tokens: {runs.SIZE_NAMES}; or EDM2s of ImageNet-512: EDM2-S,EDM2-XXL",
    )
    parser.add_argument("--batch", type=int, help="default 128, of an EDM2 larger than S 16")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: bf16")
    parser.add_argument("--card", choices=[n for n in hardware.NAMES if n != "cpu"], default="h100")
    parser.add_argument("--json", type=Path, help="default launches.json or, of an EDM2, launches-edm2.json")
    parser.add_argument("--against", type=Path, help="another of these files: print before and after")


def on_a_gpu(op: str) -> Callable:
    """The backend of an op that runs first on a GPU with everything built."""
    names = [n for n in ("native", "triton", "torch") if importlib.util.find_spec(f"cmt_kernels.{op}.{n}")]
    found = [importlib.import_module(f"cmt_kernels.{op}.{n}") for n in (*names, "reference")]
    found.sort(key=lambda module: bool(getattr(module, "loses", lambda device: None)("cuda")))
    return getattr(found[0], op)


@contextlib.contextmanager
def as_on_a_gpu(trace: Trace, plain: tuple[str, ...] = ()) -> Iterator[None]:
    """Ops called on CPU tensors inside run the backends of a GPU, those of `plain` torch's own ops, and tell the trace of
    their call."""

    def wrap(op: str, _: Callable) -> Callable:
        backend = implementation(op, "reference") if op in plain else on_a_gpu(op)

        def told(*arguments: Any, **named: Any) -> Any:
            trace.case(op, arguments, named)
            return backend(*arguments, **named)

        return told

    with through(wrap, "cpu", OPS):
        yield


class Step:
    """One training step of an objective on fake tensors; made and called inside FakeTensorMode."""

    def __init__(self, objective: str, m: runs.Model, precision: str) -> None:
        work = runs.workspace(objective, m._replace(batch=1), "cpu")
        self.stage: Stage = runs.stage_of(work, objective, m, precision, False, None)
        self.random, self.path, self.m = Random(work.run.seed, 1, 0), work.path, m
        net = models.build(work.run.model, work.run.path, work.run.sigma_data, work.data.shape, work.data.classes)
        net.to = lambda device: net  # torch cannot move fake parameters, and they are where they should be
        self.engine = LocalEngine(net, self.stage, torch.device("cpu"), lends=True)  # as on a GPU
        ratio = getattr(self.stage.objective, "ratio", 0.0)
        self.sizes = Sizes.of(net, m.batch, tangent_rows(m.batch, ratio), m.tokens)
        self.drawn = self.rows(OBJECTIVES[self.stage.objective.kind].draws)

    def rows(self, draws: str) -> Batch | Points:
        """Rows as the loader or the pool gives them."""
        m = self.m
        x, other = (torch.randn(m.batch, m.channels, m.side, m.side) for _ in range(2))
        sample = torch.arange(m.batch)
        labels, drop = sample % 10, torch.zeros(m.batch, dtype=torch.bool)
        if draws == "data":
            return Batch(x, labels, sample, drop)
        t = torch.rand(m.batch)
        return Points(x, t, other, t / 2, labels, drop, sample)

    def context(self, trace: Trace) -> LossContext:
        """What the loss reads beside its rows."""
        return LossContext(self.path, self.random)

    def __call__(self, trace: Trace) -> None:
        def net(*arguments: Any) -> Any:
            trace.part = "forward" if torch.is_grad_enabled() else "target"
            y = self.engine(*arguments)
            trace.part = "loss"
            return y

        trace.part = "loss"
        objective = OBJECTIVES[self.stage.objective.kind].function
        loss = objective(net, self.drawn, self.stage.objective, self.context(trace))[0].mean()
        trace.part = "backward"
        self.engine.backward(loss)
        trace.part = "optimizer"
        self.engine.step(1e-5)


def count(objective: str, m: runs.Model, precision: str) -> Trace:
    """The launches of one step."""
    with FakeTensorMode():
        step = Step(objective, m, precision)
        trace = Trace(step.sizes)
        with as_on_a_gpu(trace), trace:
            step(trace)
    return trace


def predicted_ms(launch: Launch, card: Card, wide: str = "fp32") -> float:
    """At least so long on the card: PREDICTED of bytes and FLOPs alone. wide: what products of float32 are computed in."""
    rate = card.matmul["bf16" if "bfloat16" in launch.dtypes else wide]
    return 1e3 * max(launch.nbytes / card.copy, launch.flops / rate)


def rows_of(launches: list[Launch], card: Card, wide: str = "fp32") -> list[dict[str, Any]]:
    """Launches of one kind, op, tensor and dtype of one part added up."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for launch in launches:
        each = (launch.kernels, launch.nbytes, launch.flops, predicted_ms(launch, card, wide))
        total = sums[tuple(getattr(launch, key) for key in KEYS)]
        total[:] = [a + b for a, b in zip(total, each)]
    names = ("launches", "bytes", "flops", "predicted_ms")
    return [dict(zip(KEYS, key)) | dict(zip(names, total)) for key, total in sums.items()]


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """kind, and whose tensor of those in SPLIT -> launches, GB, predicted ms; the largest first."""
    table: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for row in rows:
        names = [row["kind"], f"  {row['kind']}: {row['what']}"][: 1 + (row["kind"] in SPLIT)]
        if row["part"] == "optimizer":
            names = ["(optimizer's)"]
        for name in names:
            total = table[name]
            total[:] = [a + b for a, b in zip(total, (row["launches"], row["bytes"] * 1e-9, row["predicted_ms"]))]
    size = lambda name: (
        -table[name.strip().split(":")[0]][2],
        name.strip().split(":")[0],
        name.startswith(" "),
        -table[name][2],
    )
    return {name: table[name] for name in sorted(table, key=size)}


def host_us(objective: str, m: runs.Model, precision: str) -> dict[str, Any] | None:
    """The host's microseconds a launch, and from what: the eager step that was measured, over the launches of its tree."""
    timed = MEASURED / "h100" / "step.json"
    if not (timed.exists() and BASELINE.exists()):
        return None
    steps, counted = (json.loads(path.read_text("utf-8")) for path in (timed, BASELINE))
    wanted = {"objective": objective, "model": m.name, "batch": m.batch, "precision": precision.removesuffix("-stream")}
    is_it = lambda row: all(row.get(key) == value for key, value in wanted.items())
    host = next((row["host_ms"] for row in steps["rows"] if is_it(row) and row["how"] == "eager"), None)
    total = next((step["launches"] for step in counted["steps"] if is_it(step)), None)
    if not host or not total:
        return None
    source = f"h100/step.json at {steps['commit']}, over {BASELINE.name} at {counted['commit']}"
    return {"us": 1e3 * host / total, "from": source}


def result(objective: str, m: runs.Model, precision: str, card: Card) -> dict[str, Any]:
    """What is written of one step."""
    trace = count(objective, m, precision)
    rows, host = rows_of(trace.launches, card), host_us(objective, m, precision)
    total = lambda key: sum(row[key] for row in rows)
    step = {"objective": objective, "model": m.name, "batch": m.batch, "precision": precision}
    step |= {"launches": total("launches"), "calls": len(trace.launches), "unlaunched_calls": trace.unlaunched}
    step |= {"bytes": total("bytes"), "flops": total("flops"), "predicted_gpu_ms": total("predicted_ms")}
    step |= {"host_us_a_launch": host, "predicted_host_ms": 1e-3 * host["us"] * step["launches"] if host else None}
    return step | {"rows": rows}


def show(step: dict[str, Any], before: dict[str, Any] | None) -> None:
    """The table of a step by kind; beside it what another file has."""
    print(f"\n{step['objective']} {step['model']} batch {step['batch']} {step['precision']}: {summary(step)}")
    if before:
        print(f"{'before':>{len(step['objective']) + 7}}: {summary(before)}")
    after, earlier = by_kind(step["rows"]), by_kind(before["rows"]) if before else {}
    three = lambda v: f"{v[0]:8.0f} {v[1]:9.2f} {v[2]:9.2f}"
    head = f"{'launches':>8} {'GB':>9} {'ms':>9}"
    print(f"{'':34}{head}" + (f"   before {head}" if before else ""))
    for name in [*after, *(n for n in earlier if n not in after)]:
        line = f"{name:34}{three(after.get(name, [0, 0, 0]))}"
        print(line + (f"          {three(earlier.get(name, [0, 0, 0]))}" if before else ""))


def summary(step: dict[str, Any]) -> str:
    """One line of totals."""
    host = step["host_us_a_launch"]
    said = f", host {step['predicted_host_ms']:.0f} ms ({host['us']:.1f} us a launch)" if host else ""
    return (
        f"{step['launches']} launches, {step['unlaunched_calls']} calls without one, {step['bytes'] * 1e-9:.1f} GB, "
        f"{step['flops'] * 1e-12:.1f} TFLOP; PREDICTED GPU {step['predicted_gpu_ms']:.1f} ms at least{said}"
    )


def same(other: dict[str, Any], step: dict[str, Any]) -> bool:
    """Whether two trees' steps compare: one network and batch, and a stream in bf16 with what had none."""
    kind = lambda s: (s["objective"], s["model"], s["batch"], s["precision"].removesuffix("-stream"))
    return kind(other) == kind(step)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the JSON."""
    arguments.json = arguments.json or TARGET
    try:
        m = runs.model(arguments.model, arguments.batch or 128)
    except ValueError as error:
        raise SystemExit(f"launches: {error}") from None
    card = hardware.card(arguments.card, MEASURED)
    known = json.loads(arguments.against.read_text("utf-8"))["steps"] if arguments.against else []
    said = about("cpu")
    said = {"predicted": True, **{key: said[key] for key in ("torch", "commit", "date")}}
    ceilings = {"gb_s": card.copy * 1e-9, "gflop_s": card.matmul["bf16"] * 1e-9, "measured": card.measured}
    steps = []
    for objective, precision in itertools.product(arguments.objective or CHOICES, arguments.precision or ["bf16"]):
        step = result(objective, m, precision, card)
        show(step, next((other for other in known if same(other, step)), None))
        steps.append(step)
    write_json(arguments.json, said | {"card": card.name, "ceilings": ceilings, "steps": steps})
    print("written to", arguments.json)
    return 0
