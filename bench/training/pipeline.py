"""What the trainer loses around its steps: stages as `cmt train` runs them, beside their bare steps in the same process.

A stage is trained by the loop, with loader, log, checkpoints and the stop that it looks for; the same rows on another engine
take as many steps with nothing around them, before and after. Digits by both recipes, and a store of random latents through each
loader. Nothing is judged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.results_file import Results
from bench.harness.timing import Deadline
from bench.training.loader import write_store
from cmt_fast.config import loading
from cmt_fast.config.schema import STAGES
from cmt_fast.data import dali
from cmt_fast.engine import LocalEngine
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import batches, loop

TINY = ["model.width=32", "model.depth=1", "model.heads=2"]
QUIET = [f"{s}.{key}=null" for s in ("mid", "post", "control") for key in ("eval_every_nimg", "grid_every_nimg")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=80, help="steps of every stage")
    parser.add_argument("--minutes", type=float, help="after which the stages that are left are named")
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run: width 32, one block, 8 steps, pre and mid alone"
    )
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-pipeline.json")


def overrides(steps: int, batch: int, device: str) -> list[str]:
    """Short stages that checkpoint twice and judge nothing."""
    out = [f"device={device}", *QUIET]
    for name in STAGES:
        out += [f"{name}.images_nimg={steps * batch}", f"{name}.batch={batch}", f"{name}.warmup_nimg=0"]
        out += [f"{name}.checkpoint_every_nimg={steps * batch // 2}"]
    rounds = max(1, steps // 4)
    return out + [f"{name}.trajectories.pool_steps={rounds}" for name in ("mid", "post")]


def bare(work: Workspace, name: str, steps: int) -> float:
    """Seconds of `steps` steps of a stage with nothing around them: rows, loss, backward, optimizer."""
    stage = work.stage(name)
    engine = LocalEngine(work.build(), stage.config, work.device)
    source = batches.provider(work, stage, engine)
    wait = torch.cuda.synchronize if work.device.type == "cuda" else lambda: None
    try:
        for step in range(-2, steps):
            if step == 0:
                wait()
                begun = time.perf_counter()
            engine.backward(source.loss(engine, max(step, 0) if source.pool is None else step % steps)[0])
            engine.step(1e-4)
        wait()
        return time.perf_counter() - begun
    finally:
        source.close()


def measure(
    label: str,
    recipe: str,
    more: list[str],
    names: list[str],
    steps: int,
    folder: Path,
    results: Results,
    end: Deadline,
) -> None:
    """A row for each stage of one run: trained by the loop, then its bare steps."""
    run = loading.load(recipe, more)
    work = Workspace(run, folder / label.replace(" ", "-"))
    for name in names:
        if end.over:
            return
        batch, before = run.stages[name].batch, bare(work, name, steps)
        begun = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            loop.train(work, [name])
        whole = time.perf_counter() - begun
        log = [json.loads(x) for x in (work.folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        train_s = [row["wall"]["train_s"] for row in log if row["kind"] == "train"][-1]
        after = bare(work, name, steps)
        alone = (before + after) / 2
        results.add(
            {"run": label, "recipe": recipe, "stage": name, "batch": batch, "steps": steps,
             "bare_images_per_s": steps * batch / alone, "bare_s": [before, after],
             "loop_images_per_s": steps * batch / train_s, "whole_images_per_s": steps * batch / whole,
             "train_s": train_s, "whole_s": whole, "loses": 1 - alone / train_s, "around_s": whole - train_s}
        )  # fmt: skip
        results.done(f"{label}, {name}")
        print(line(results["rows"][-1]), flush=True)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['run']:16} {row['stage']:7} B{row['batch']:<3} {row['bare_images_per_s']:9.1f} {row['loop_images_per_s']:9.1f} "
        f"{row['loses']:7.1%} {row['around_s']:7.2f}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON, which says where DALI is not installed."""
    device, steps = arguments.device, 8 if arguments.tiny else arguments.steps
    small = TINY if arguments.tiny else []
    results = Results("pipeline", device, arguments.json, tiny=arguments.tiny, dali=dali.version())
    end, several = Deadline(arguments.minutes), ["pre", "mid"] if arguments.tiny else ["pre", "mid", "post", "control"]
    results.plan(f"{recipe}, {name}" for recipe in ("digits", "digits-mf") for name in several)
    results.plan(f"latents {kind}, pre" for kind in ("torch", "dali"))
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    print(
        "images/s of bare steps, of the loop, what the loop loses, seconds before and after it (start, grid, checkpoints)"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for recipe in ("digits", "digits-mf"):
            more = [*overrides(steps, 64, device), *small]
            measure(recipe, recipe, more, several, steps, folder, results, end)
        write_store(folder / "store", 512, (4, 16, 16))
        latents = [
            *overrides(steps // 2, 32, device),
            f"data={{kind: latents, path: {folder / 'store'}}}",
            "model.patch=4",
            *small,
        ]
        for kind in ("torch", *(["dali"] if results["dali"] else [])):
            more = [*latents, f"loader.kind={kind}"]
            measure(f"latents {kind}", "digits-mf", more, ["pre"], steps // 2, folder, results, end)
    if results["dali"] is None:
        results.skip("latents dali, pre", "DALI is not installed")
    print("written to", results.path)
    return 0
