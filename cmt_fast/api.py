"""CMT-Fast from Python: open runs and recipes, build networks, sample, evaluate, roll out a teacher, take training steps.

Nothing is registered and nothing is global: every function takes names or folders and returns tensors, plain data or a
`Workspace`. What a user gets wrong raises ConfigError, one line that names the key. See docs/api.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported where it is used
    from torch import Tensor, nn

    from cmt_fast.run.workspace import Workspace


def _at_least(**numbers: tuple[int | None, int]) -> None:
    """Raises ConfigError for a number (value, least) that is too small; None is the recipe's own."""
    from cmt_fast.config.errors import ConfigError

    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ConfigError(f"{value} is not at least {least}", name)


def open_recipe(recipe: str, *overrides: str, out: str | Path | None = None) -> Workspace:
    """The run that a recipe describes, on its data and device; writes nothing.

    recipe: a name (`cmt recipes ls`) or a YAML file; overrides: "mid.lr=1e-4"; out: its folder (default: runs/NAME).
    """
    from cmt_fast.config import loading
    from cmt_fast.run import folder
    from cmt_fast.run.workspace import Workspace

    run = loading.load(recipe, overrides)
    return Workspace(run, Path(out) if out else folder.default(run))


def open_run(run: str | Path) -> Workspace:
    """A run that is on disk, as `cmt train` left it. Raises ConfigError where the folder holds none."""
    from cmt_fast.run import workspace

    return workspace.open_run(Path(run))


def network(stage: str | Path) -> nn.Module:
    """The trained network of "RUN/STAGE": frozen, its first EMA, fp32, on the run's device.

    It is called as net(x, t, r, labels): x (B, ...), t and r (B,), labels (B,) or None. A fresh one with random weights is
    `open_recipe(...).build()`.
    """
    from cmt_fast.run.workspace import open_stage

    work, name = open_stage(str(stage))
    return work.network(name)


def sample(
    stage: str | Path,
    n: int = 64,
    steps: int = 1,
    seed: int = 0,
    solver: bool = False,
    guidance: float | Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Samples of "RUN/STAGE": x (n, ...) float32 in data units on the CPU, labels (n,) or None; the bits of `cmt sample`.

    steps: network calls; solver: integrate the ODE with them, as a diffusion model is sampled; guidance: as `--guidance`, the
    scale that a network is told, or several in turn, or the solver's; by default the recipe's. Raises ConfigError where
    n or steps is below 1, the stage is not trained, the recipe's sampler has no such number of steps, or a scale means nothing.
    """
    import torch

    from cmt_fast.run import telling
    from cmt_fast.run.workspace import open_stage

    _at_least(n=(n, 1), steps=(steps, 1))
    work, name = open_stage(str(stage))
    setting = telling.asked(work, name, solver, guidance)
    x = setting.generate(work.network(name), steps, n, seed, solver, work.run.eval.batch)
    return x, setting.labels(torch.arange(n))


def sample_to(
    stage: str | Path,
    out: str | Path,
    n: int = 64,
    steps: int | None = None,
    seed: int = 0,
    solver: bool = False,
    **more: Any,
) -> str:
    """Samples of "RUN/STAGE" on disk, as `cmt sample --out` writes them: PNGs in a folder, or one .npz; what is there is kept.

    more: `format` ("png", "arrays", "adm"), `first`, `batch`, `classes` ("3,7"), `guidance`, `decode`, `vae`, as the options.
    Call it in the main thread. Returns the line that says what was written. Raises ConfigError as the command does.
    """
    from cmt_fast.run import samples

    _at_least(n=(n, 1), steps=(steps, 1))
    kind = more.pop("format", None)
    valid = {*samples.Request._fields[3:], *samples.Asked._fields} - {"solver"}
    if wrong := sorted(set(more) - valid):
        raise TypeError(f"sample_to: {wrong[0]!r} is no argument; valid are {', '.join(sorted(valid))}, format")
    own = {key: more.pop(key) for key in ("first", "batch") if key in more}
    request = samples.Request(n, steps or 0, seed, solver=solver, **own)
    return samples.save(samples.opened(str(stage), request, samples.Asked(**more)), out, kind, quiet=True)


def evaluate(
    stage: str | Path,
    steps: Sequence[int] = (1, 2),
    n: int | None = None,
    seed: int | None = None,
    solver: bool = False,
    guidance: float | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of "RUN/STAGE" by number of steps, such as {"1": {"frechet": ..., "accuracy": ...}}; those of `cmt eval`.

    n, seed, guidance: the recipe's unless given. Raises ConfigError where n is below 2, a number of steps below 1 or a scale
    means nothing, FloatingPointError where samples are not finite.
    """
    from cmt_fast.run import telling
    from cmt_fast.run.workspace import open_stage

    _at_least(n=(n, 2), steps=(min(steps, default=0), 1))
    work, name = open_stage(str(stage))
    setting = telling.asked(work, name, solver, guidance)
    n = n or work.run.eval.n
    judge = work.judging.open_judge(samples=n)
    with work.judging.going_on(name, work.finished(name).manifest):
        found = work.judging.at(setting).evaluate(work.network(name), tuple(steps), n, solver, seed, judge, quiet=True)
    return {k: {key: v for key, v in row.items() if key != "left_out"} for k, row in found.items()}


def trajectories(work: Workspace, stage: str = "mid", n: int = 8) -> tuple[Tensor, tuple[float, ...], Tensor | None]:
    """The first n teacher trajectories of a stage: nodes (N + 1, n, ...) from noise to data, their N + 1 times, labels (n,).

    The teacher computes in the stage's format (`trajectories.precision`), as in `cmt trajectories`, and is rolled out anew
    where the stage reads a cache; where it drops labels, the number of classes stands for none. Raises ConfigError where the
    stage has no teacher's trajectories, its teacher is not trained or guided by nothing, or n is below 1.
    """
    import dataclasses
    import functools

    from cmt_fast.diffusion.solvers import table
    from cmt_fast.runtime import machine
    from cmt_fast.teacher import solver_record
    from cmt_fast.teacher.pool import Prior, roller
    from cmt_fast.teacher.precision import Teacher

    _at_least(n=(n, 1))
    own, data = work.stage(stage), work.data
    work.check_guidance()
    t = solver_record.settled(own.folder, own.trajectories)
    config = dataclasses.replace(own.config, trajectories=t)  # type: ignore[type-var]
    teacher = Teacher(stage, config, functools.cache(work.network), own.path, work.device)
    machine.allow_tf32(config.precision == "tf32")
    try:
        format = teacher.choose(own.seed, own.index, data.shape, work.drawn)["precision"]
        prior = Prior(data.shape, work.drawn, own.seed, own.index, config.trajectory_dropout)
        roll = roller(teacher.net(format), own.path, t, prior, work.device, n, teacher.computing(format))
        nodes, labels = roll(0, n)
    finally:
        machine.allow_tf32(False)
    return nodes, tuple(table(own.path, t.solver, t.calls, t.t_max, t.t_min, t.order, t.shift).times), labels


def train(work: Workspace, stages: Sequence[str] | None = None) -> None:
    """Train stages of a run in order, as `cmt train` does; the same call again goes on where it stopped.

    Call it in the main thread: an interrupt ends it with a checkpoint and raises SystemExit. Raises ConfigError for a
    stage that the run does not have.
    """
    from cmt_fast.train import loop

    for name in stages or ():
        work.stage(name)
    loop.train(work, [name for name in work.run.stages if stages is None or name in stages])


def training_steps(work: Workspace, stage: str) -> tuple[nn.Module, Callable[[], dict[str, float]]]:
    """A stage's network and a function that takes its next optimizer step and returns its loss, gradient norm and lr.

    It is what `cmt train` does from the stage's start, in one process, with nothing written: the stage's own batches, its
    precision, optimizer and EMA, on a GPU as one CUDA graph. Raises ConfigError where a stage that it needs is not trained or
    its step cannot be the graph that it asks for; the function raises that too, and
    ValueError after the stage's last step.
    """
    from cmt_kernels.attention import small

    from cmt_fast.engine import LocalEngine
    from cmt_fast.engine.graph import StepGraph
    from cmt_fast.runtime import machine, progress
    from cmt_fast.train import attention_choice, batches

    own = work.stage(stage)
    work.check_guidance()
    config = own.config
    parts, plan = own.grad_accum_steps(1), own.schedule
    engine = LocalEngine(work.build(), config, work.device, parts)
    if config.start:
        engine.start_from(work.weights(config.start)[0])
    source = batches.provider(work, own, engine)
    gradient = StepGraph(engine, lambda drawn: source.loss_of(engine, drawn), stage, progress.say)
    attention = attention_choice.settle(work, config, None)

    def step() -> dict[str, float]:
        n, total = engine.step_count, 0.0
        if n >= plan.total:  # a linear schedule's rate would be negative from here on
            raise ValueError(f"{stage}: all of its {plan.total} steps are taken")
        machine.allow_tf32(config.precision == "tf32")
        try:
            with small.using(attention):
                for part in range(parts):
                    total += float(gradient(source.draw(n, part))["loss"]) / parts
            lr = plan.lr(config, n)
            return {"loss": total, "grad_norm": float(engine.step(lr)), "lr": lr}
        finally:
            machine.allow_tf32(False)

    return engine.net, step


__all__: list[Any] = [
    "evaluate",
    "network",
    "open_recipe",
    "open_run",
    "sample",
    "sample_to",
    "train",
    "training_steps",
    "trajectories",
]
