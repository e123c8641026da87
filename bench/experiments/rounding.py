"""`python -m bench rounding`: consistency post-training in 16 bits by the measured rule, beside fp32 and beside no rule.

Three parts. The closed form: a mixture's denoiser, whose network's output is rounded to bf16 or fp16, at steps of t/2 to
t/8192: how much of f(x_t) - f(x_r) is rounding, and how far above the limit half the step no longer doubles it. Gradients:
of trained networks of each recipe, at several q, the gradient over many batches in 16 bits, with and without the rule,
beside fp32: `bias` is the length of the mean difference in units of the mean gradient, `noise` the rms difference of a batch
in units of its gradient. Training: pre- and mid-training in fp32, post-training from there in each precision, over seeds:
Fréchet distances and the last loss.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiments.precisions import WideProducts, has_bf16
from bench.harness.results_file import Results
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Ect, Gmm
from cmt_fast.data.gmm import Exact, load
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.engine import LocalEngine
from cmt_fast.objectives import Batch, StageContext, rounding
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import metrics_log
from cmt_fast.train import batches, loop, rounding_choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HALVINGS, BATCHES = 13, 32
QS = (4, 16, 64, 256, 1024, 4096)
FILE = Path("bench/results/cpu/rounding.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", default=["gmm", "digits"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--short", type=float, default=1.0, help="of each stage's images, the share that is trained")
    parser.add_argument("--json", type=Path, default=FILE)


def run(args: argparse.Namespace) -> int:
    """All three parts; the JSON is whole after each row."""
    products = "by the processor" if has_bf16() else "bf16 factors in fp32, rounded to bf16"
    results = Results("rounding", "cpu", args.json, products=products, short=args.short)
    for name, dtype in DTYPES.items():
        for row in closed_form(dtype):
            results.add({"part": "closed form", "precision": name, **row})
    for recipe in args.recipes:
        for seed in map(int, args.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                for row in trained(recipe, seed, args.short, Path(folder)):
                    results.add({"recipe": recipe, "seed": seed, **row})
                    print(row, flush=True)
    return 0


def closed_form(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of each halving of the step: the least, the median and the largest ratio over times."""
    path, mixture = ProbabilityPath("ve", 0.75), Gmm(n=512)
    exact = Exact(mixture, path)

    def low(x: Tensor, t: Tensor, *_: Any) -> Tensor:
        s = path.sigma_data
        skip, out = column(s**2 / (t**2 + s**2), x), column(t * s / (t**2 + s**2).sqrt(), x)
        return skip * x + out * ((exact(x, t) - skip * x) / out).to(dtype).to(x.dtype)

    batch = Batch(load(mixture).x.double(), None, torch.arange(mixture.n), None)
    config = Ect(q=2.0, k=0.0, doublings=HALVINGS - 1, mean=-0.8, std=1.0)
    parts = rounding.measure(low, lambda x, t, *_: exact(x, t), batch, Random(0, 2, 0), config, StageContext(path))
    return [{"step": 0.5 ** (k + 1), "ratio": three(part.ratio)} for k, part in enumerate(parts)]


def three(values: list[float]) -> list[float]:
    """Least, median, largest."""
    return [min(values), statistics.median(values), max(values)]


@contextlib.contextmanager
def computing(precision: str) -> Iterator[None]:
    """bf16 on a CPU without instructions for it as precisions.py does it."""
    with contextlib.nullcontext() if precision != "bf16" or has_bf16() else WideProducts():
        yield


def trained(recipe: str, seed: int, short: float, folder: Path) -> Iterator[dict[str, Any]]:
    """pre and mid once, then gradients at each q, then post in each precision."""
    plain = loading.load(recipe, [f"seed={seed}"])
    lengths = [f"{name}.images_nimg={round(short * plain.stages[name].images_nimg)}" for name in ("pre", "mid", "post")]
    given = [f"seed={seed}", *lengths, "post.eval_every_nimg=null", "mid.eval_every_nimg=null"]
    parents = Workspace(loading.load(recipe, given), folder / "parents")
    loop.train(parents, ["pre", "mid"])
    if seed == 0:
        for q in QS:
            for precision in DTYPES:
                yield gradients(recipe, [*given, f"post.objective.q={q}"], precision, q, folder)
    for precision in ("fp32", *DTYPES):
        work = Workspace(
            loading.load(recipe, [*given, f"post.precision={precision}"]), folder / precision, parents.folder
        )
        with computing(precision):
            loop.train(work, ["post"])
        rows = [r for r in metrics_log.read(folder / precision / "post" / metrics_log.METRICS) if r["kind"] == "train"]
        figures = work.judging.evaluate(work.network("post"), work.run.eval.steps, work.run.eval.n)
        yield {
            "part": "training", "precision": precision, "steps": rows[-1]["step"], "skipped": rows[-1].get("skipped_steps"),
            "loss": statistics.fmean(r["loss"] for r in rows[-len(rows) // 8 :]),
            "frechet": {str(k): f["frechet"] for k, f in figures.items()},
        }  # fmt: skip


def gradients(recipe: str, given: list[str], precision: str, q: int, folder: Path) -> dict[str, Any]:
    """What the rule finds of a trained network at this q, and the gradients of the objective alone with and without it."""
    work = Workspace(loading.load(recipe, [*given, f"post.precision={precision}"]), folder / "parents")
    stage = work.stage("post")
    stage = stage.replaced(anchor=None, trajectories=None)
    weights, _ = work.weights("mid")
    engine = LocalEngine(work.build(), stage.config, work.device)
    engine.start_from(weights)
    source = batches.provider(work, stage, engine)
    out: dict[str, Any] = {"part": "gradients", "precision": precision, "q": q}
    with computing(precision):
        try:
            rule = rounding_choice.settle(stage, engine, source, None)
        except ConfigError as error:
            rule, out["refused"] = None, str(error)
        if rule:
            out |= {"ratio": three(rule.parts[0].ratio), "beyond": rule.beyond(0)}
            out["wide"] = rule.wide(0, stage.config.batch) / stage.config.batch
        whole = sums(engine, source, rounding.Rounding(0.0, [all_wide()]))
        out["without the rule"] = compared(whole, sums(engine, source, None))
        if rule:
            out["by the rule"] = compared(whole, sums(engine, source, rule))
    source.close()
    return out


def all_wide() -> rounding.Part:
    """A part of which every row is in fp32."""
    return rounding.Part(*([1.0] * rounding.BINS for _ in rounding.Part._fields))


def sums(engine: LocalEngine, source: batches.BatchProvider, rule: rounding.Rounding | None) -> list[Tensor]:
    """The gradient of each of the batches."""
    out, source.rounding = [], rule
    for step in range(BATCHES):
        loss, _ = source.loss(engine, step)
        loss.backward()
        out.append(engine.g.double())
        engine.g.zero_()
    return out


def compared(whole: list[Tensor], low: list[Tensor]) -> dict[str, float]:
    """bias: |mean difference| / |mean gradient|; noise: rms of |difference| / |gradient| of a batch."""
    mean = lambda gs: torch.stack(gs).mean(0)
    differences = [a - b for a, b in zip(low, whole)]
    noise = [float((d.norm() / g.norm()) ** 2) for d, g in zip(differences, whole)]
    return {"bias": float(mean(differences).norm() / mean(whole).norm()), "noise": statistics.fmean(noise) ** 0.5}
