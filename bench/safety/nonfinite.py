"""NaN planted on one rank of two, in a loss, a gradient or a tangent, under every engine.

A case trains a tiny network on two CPU ranks until a layer of one of them gives NaN: in its output, in the gradient that
passes it or in the tangent that it gives. It holds where both ranks end with the same words, exit code 65 and a state that is
to the bit that of before the step, where `replay` on two ranks names the layer that was spoilt, and where the run goes on to its
end without that step once it is told `on_nonfinite=skip`. Layer, step, rank and seed are drawn. 60 cases, 12 an engine, are some
150 CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import results_file
from bench.safety import planted
from bench.training.zero import Setting, launch
from cmt_fast.config import loading
from cmt_fast.engine import Engine, sums
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, exits
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop, nonfinite, replay

LAYERS = ("net.embed", "net.blocks.0.qkv", "net.blocks.0.proj", "net.blocks.0.fc1", "net.blocks.0.fc2", "net.final")
ENGINES = tuple(Setting(stage, 2) for stage in (None, 0, 1, 2, 3))
STEPS = 6
FILE = results_file.ROOT / "bench/results/cpu/nonfinite.json"
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "eval.n=100", "eval.n_during=100", "device=cpu"]


class Case(NamedTuple):
    """What is planted: kind, layer, after how many steps, on which rank; seed: of the run."""

    kind: str
    layer: str
    step: int
    rank: int
    seed: int

    @property
    def stage(self) -> tuple[str, str]:
        """Recipe and stage: those of MeanFlow have tangents."""
        return ("digits-mf", "control") if self.kind == "tangent" else ("digits", "pre")

    def overrides(self, setting: Setting) -> list[str]:
        """Its run: a checkpoint after two steps, from which the replay goes on where that is before."""
        name = self.stage[1]
        length = [f"{name}.images_nimg={8 * STEPS}", f"{name}.batch=8", f"{name}.checkpoint_every_nimg=16"]
        quiet = [f"{name}.eval_every_nimg=null", f"{name}.grid_every_nimg=null", f"{name}.warmup_nimg=0"]
        start = [f"{name}.start=null"] if name == "control" else []
        return [*SMALL, *setting.overrides, *length, *quiet, *start, f"seed={self.seed}"]


def cases(n: int, seed: int) -> list[tuple[Setting, Case]]:
    """n of them, each kind in turn under each engine in turn."""
    dice = random.Random(seed)
    draw = lambda kind: Case(kind, dice.choice(LAYERS), dice.randrange(STEPS), dice.randrange(2), dice.randrange(1000))
    return [(ENGINES[i // 3 % len(ENGINES)], draw(planted.KINDS[i % 3])) for i in range(n)]


def _state(engine: Engine) -> dict[str, str]:
    """A checksum of every tensor that a checkpoint would hold; every rank calls it."""
    return {
        f"{file}.{k}": sums.text(sums.of_tensors([tensors[k]]))
        for file, tensors in engine.state().items()
        for k in sorted(tensors)
    }


def one(case: Case, setting: Setting, folder: Path) -> dict[str, Any]:
    """Train it to its end and replay the step, on every rank."""
    recipe, name = case.stage
    space = Workspace(loading.load(recipe, case.overrides(setting)), folder)
    states: list[dict[str, str]] = []
    take = nonfinite.Guard.take

    def watched(self: nonfinite.Guard, step: int, call: Callable[[int], float], row: bool, look: bool) -> float:
        if step == case.step:
            states.append(_state(self.engine))
        try:
            return take(self, step, call, row, look)
        except nonfinite.NotFinite:
            states.append(_state(self.engine))
            raise

    nonfinite.Guard.take = watched  # type: ignore[method-assign]
    out: dict[str, Any] = {"said": "the run was not stopped", "code": 0, "equal": False}
    with planted.nan(case.kind, case.layer, lambda step: step == case.step, case.rank):
        try:
            loop.train(space, [name])
        except nonfinite.NotFinite as error:
            out = {"said": str(error), "code": error.code, "equal": len(states) == 2 and states[0] == states[1]}
        finally:
            nonfinite.Guard.take = take  # type: ignore[method-assign]
        again = replay.replay(Workspace(loading.load(recipe, case.overrides(setting)), folder), name, case.step + 1)
        skips = Workspace(loading.load(recipe, [*case.overrides(setting), "on_nonfinite=skip"]), folder)
        loop.train(skips, [name])
    kept = checkpoint.complete(folder / name).manifest.get("nonfinite")
    return {**out, "replayed": nonfinite.told(again.traced) if again.traced else "finite", "kept": kept}


def fault(case: Case, ranks: list[dict[str, Any]]) -> str:
    """Why a case does not hold; empty where it does."""
    if any(r != ranks[0] | {"equal": r["equal"]} for r in ranks):
        return f"ranks differ: {ranks}"
    first = ranks[0]
    where = {
        "loss": f"begins at {case.layer}",
        "gradient": f"backward pass at {case.layer}",
        "tangent": f"the tangent of {case.layer}",
    }
    for what, bad in (
        (f"exit code {first['code']}", first["code"] != exits.NOT_FINITE),
        ("its state has changed", not all(r["equal"] for r in ranks)),
        (
            f"it says {first['said']!r}",
            where[case.kind] not in first["said"] or f"rank {case.rank}" not in first["said"],
        ),
        (f"replay says {first['replayed']!r}", where[case.kind] not in first["replayed"]),
        (f"after it: {first['kept']}", first["kept"] != {"skipped": [case.step + 1]}),
    ):
        if bad:
            return what
    return ""


def measured(every: list[tuple[Setting, Case]], folder: Path) -> dict[str, Any]:
    """{"cases", "held", "engines": {name: [held, of]}, "faults": [...]}; a group of processes for each engine."""
    found, engines = [], dict[str, list[int]]()
    for setting in dict.fromkeys(setting for setting, _ in every):
        mine = [(k, case) for k, (own, case) in enumerate(every) if own == setting]
        place = lambda k: folder / f"{setting.name}-{k}"  # noqa: B023

        def work() -> None:
            for k, case in mine:  # noqa: B023
                result = one(case, setting, place(k))  # noqa: B023
                (folder / f"{k}-{distributed.rank()}.json").write_text(json.dumps(result))
                distributed.barrier()

        launch(2, work, folder)
        engines[setting.name] = [0, len(mine)]
        for k, case in mine:
            why = fault(case, [json.loads((folder / f"{k}-{rank}.json").read_text()) for rank in range(2)])
            engines[setting.name][0] += not why
            found += [f"{setting.name} {case}: {why}"] if why else []
    return {"cases": len(every), "held": len(every) - len(found), "engines": engines, "faults": found}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=60, help="cases (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--out", type=Path, default=FILE, help="write the figures here as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a line an engine; 1 where a case does not hold."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401  once, before the forks
    import torch._dynamo  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="nonfinite-") as place:
        before, about = os.times(), results_file.about("cpu")  # of the program that begins
        figures = {"seed": arguments.seed, **measured(cases(arguments.n, arguments.seed), Path(place))}
        after = os.times()
    figures["cpu_s"] = round(sum(after[:4]) - sum(before[:4]), 1)
    for name, (held, of) in figures["engines"].items():
        print(f"{name:>8}: {held} of {of} decided alike, state bit-equal, layer named by the run and by replay")
    for why in figures["faults"]:
        print(f"  {why}")
    print(f"{figures['held']} of {figures['cases']} hold; {figures['cpu_s']:,.0f} CPU seconds")
    arguments.out.write_text(json.dumps(about | figures, indent=1) + "\n")
    return int(figures["held"] < figures["cases"])
