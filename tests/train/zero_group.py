"""What test_zero.py judges: groups of two processes, forked from one that has imported everything once.

`python -m tests.train.zero_group FOLDER` writes FOLDER/figures.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
from torch import nn

from bench import zero
from bench.zero import CASES, Failed, Setting, curves, do, exchange, launch, losses, small
from cmt_fast import checkpoint, distributed, loop, models, watch
from cmt_fast.cli import main as command
from cmt_fast.engine import Choice, LocalEngine
from cmt_fast.engine.zero import ZeroEngine
from cmt_fast.schema import ConstantEma, Denoise, Edm2, PowerEma, Stage

STEPS = 4
EVERY = [Setting(None, 1), *(Setting(s, 2) for s in (0, 1, 2, 3))]
PAIRS = [(1, 4), (4, 0), (0, 3), (2, 1), (4, 4), (2, 2)]  # places in EVERY: from, to


def variants(folder: Path) -> dict[str, list[float]]:
    """Loss curves of what should change nothing or little, two ranks: passes, bf16, teachers, recomputed blocks."""
    jobs, out = [], {}

    def job(name: str, case: str, setting: Setting, *more: str) -> None:
        recipe, stage = CASES[case]
        text = [*setting.overrides, *small("pre", STEPS), *small(stage, STEPS), *more]
        place = {"out": str(folder / name), "parents": str(folder / "base" / recipe)}
        jobs.append({"do": "train", "recipe": recipe, "stage": stage, "overrides": text, **place})
        out[name] = folder / name / stage

    for stage in (None, 1, 2, 3):
        job(f"passes-{stage}", "denoise", Setting(stage, 2), "pre.micro_batch=4")
        job(f"bf16-{stage}", "meanflow", Setting(stage, 2), "control.precision=bf16")
    job("sharded", "cmt", Setting(3, 2), "zero_teacher=sharded")
    job("sharded-bf16", "cmt", Setting(3, 2), "zero_teacher=sharded", "mid.trajectories.precision=bf16")
    job("recomputed", "meanflow", Setting(3, 2), "model.checkpoint_activations=true")
    launch(2, do(jobs), folder)
    return {name: losses(path) for name, path in out.items()}


class Unit(nn.Module):
    """A linear map whose rows have norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7, bias=False)
        self.outer = nn.Linear(7, 3)

    def constrain(self) -> None:
        """Rows to norm 1."""
        self.inner.weight.div_(self.inner.weight.norm(dim=1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def unet() -> nn.Module:
    """A small EDM2 network: weights of unit length, gains without a dimension, frequencies that are drawn once."""
    torch.manual_seed(0)
    model = Edm2(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head=8, dropout=0.0)
    net = models.build(model, "ve", 0.5, (3, 8, 8), 3)
    for p in net.parameters():
        if p.ndim == 0:
            p.data.fill_(0.5)
    return net


def constrained(file: Path) -> None:
    """Every engine on networks with weight constraints: the largest difference from the local one, by its state."""

    def trained(engine: Any) -> dict[str, torch.Tensor]:
        for n in range(3):
            random = torch.Generator().manual_seed(10 * n + distributed.rank())
            if isinstance(engine.net, Unit):
                loss = engine(torch.randn(8, 5, generator=random)).square().sum()
            else:
                x, t = torch.randn(4, 3, 8, 8, generator=random), torch.tensor([0.1, 0.5, 2.0, 9.0])
                d, u = engine(x, t, None, torch.arange(4) % 3, None, None, True)
                loss = ((d - x.sin()).square().flatten(1).sum(1) / u.exp() + u).mean()
            engine.backward(loss)
            engine.step(1e-2)
        return {f"{f}.{k}": t[k].clone() for f, t in engine.state().items() for k in sorted(t)}

    def net() -> Unit:
        torch.manual_seed(0)
        return Unit()

    stage = Stage(objective=Denoise(), images_nimg=10, ema=(ConstantEma(), PowerEma(sigma_rel=0.1)), clip=0.1)
    cpu, out = torch.device("cpu"), {}
    truth = trained(LocalEngine(net(), stage, cpu))
    for level in range(4):
        got = trained(ZeroEngine(net(), stage, cpu, 1, Choice(level, False, 0, 0, 0, "")))
        error = max(float((got[k] - truth[k]).abs().max()) for k in truth)
        rows = float((got["model.inner.weight"].norm(dim=1) - 1).abs().max())
        out[str(level)] = {"error": error, "rows": rows, "names": sorted(got) == sorted(truth)}
    truth = trained(LocalEngine(unet(), stage, cpu))
    for level in (1, 3):
        got = trained(ZeroEngine(unet(), stage, cpu, 1, Choice(level, False, 0, 0, 0, "")))
        same = [(n, x.shape) for n, x in sorted(got.items())] == [(n, x.shape) for n, x in sorted(truth.items())]
        apart = max(float((got[k] - truth[k]).abs().max()) for k in truth if k.startswith(("model", "ema")))
        out[f"edm2-{level}"] = {"error": apart, "names": same}
    if distributed.rank() == 0:
        file.write_text(json.dumps(out))


def killed_while_saving(folder: Path) -> dict[str, Any]:
    """SIGKILL of the writing rank in the middle of a save; then the same command again."""
    setting, out = Setting(2, 2), folder / "killed"
    text = [*setting.overrides, *small("pre", STEPS)]
    job = {"do": "train", "recipe": "digits", "stage": "pre", "overrides": text, "out": str(out), "parents": str(out)}

    def work() -> None:
        sync, calls = checkpoint.sync, []

        def deadly(path: Path) -> None:
            calls.append(path)
            if path.name == "optimizer.safetensors" and ".tmp-step-00000004" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        checkpoint.sync = deadly
        do([job])()

    try:
        launch(2, work, folder)
        codes = {}
    except Failed as failed:
        codes = failed.codes
    left = checkpoint.steps(out / "pre")
    launch(2, do([job]), folder)
    files = [checkpoint.complete(f / "pre").manifest["files"] for f in (out, folder / setting.name / "denoise")]
    return {"codes": codes, "left": left, "equal": files[0] == files[1]}


def at(step: int, rank: int, number: int) -> None:
    """Send this process a signal at a step, on one rank; all look for one at every step."""
    loop.LOOK_S = 0.0
    loss = loop.Source.loss

    def signalled(self, engine, now, part=0):
        if now == step and distributed.rank() == rank:
            os.kill(os.getpid(), number)
        return loss(self, engine, now, part)

    loop.Source.loss = signalled


def commanded(folder: Path, name: str, step: int, number: int, timeout_s: float = 300) -> Failed:
    """`cmt train` on two ranks, one of which gets a signal at a step: exit codes and what was said."""
    length = ["pre.images_nimg=3200", "pre.checkpoint_every_nimg=3200"]  # 100 steps, a row of metrics every second one
    text = [*Setting(1, 2).overrides, *small("pre"), *length, "--stages", "pre", f"timeout_s={timeout_s}"]

    def work() -> int:
        at(step, 1, number)
        return command(["train", "digits", *text, "--out", str(folder / name)])

    try:
        launch(2, work, folder, timeout_s)
    except Failed as failed:
        return failed
    raise AssertionError("the run was not stopped")


def stopped(folder: Path) -> dict[str, Any]:
    """A run stopped in the middle of a row of metrics and started again, beside one that was stopped once."""
    first = commanded(folder, "twice", 2, signal.SIGUSR1)
    middle = checkpoint.latest(folder / "twice" / "pre").manifest
    commanded(folder, "twice", 5, signal.SIGTERM)
    commanded(folder, "once", 5, signal.SIGTERM)
    both = [folder / name / "pre" for name in ("twice", "once")]
    return {
        "codes": first.codes,
        "said": first.logs[0].strip().splitlines()[-1],
        "step": middle["step"],
        "losses": [losses(f) for f in both],
        "equal": len({json.dumps(checkpoint.latest(f).manifest["files"]) for f in both}) == 1,
    }


def main(folder: Path) -> None:
    """Everything, one group after the other."""
    zero.SMALL[:] = ["model.width=16", "model.depth=2", "model.heads=2"]
    watch.draw_grid = lambda *_: None  # pictures take longer than training here, and have tests of their own
    figures: dict[str, Any] = {"curves": curves(folder, EVERY, CASES, STEPS)}
    figures["exchange"] = exchange(folder, [(EVERY[a], EVERY[b]) for a, b in PAIRS], STEPS)
    figures["variants"] = variants(folder)
    figures["losses"] = {
        f"{case}-{s.name}": losses(folder / s.name / case / stage) for s in EVERY for case, (_, stage) in CASES.items()
    }
    launch(2, lambda: constrained(folder / "constrained.json"), folder)
    figures["constrained"] = json.loads((folder / "constrained.json").read_text())
    figures["killed"] = killed_while_saving(folder)
    figures["stopped"] = stopped(folder)
    for name, number, timeout_s in (("dead", signal.SIGKILL, 300), ("hung", signal.SIGSTOP, 10)):
        failed = commanded(folder, name, 1, number, timeout_s)
        figures[name] = {"codes": failed.codes, "said": failed.logs[0].strip().splitlines()[-1]}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
