"""One step once more: from the newest checkpoint before it and counters, beside what was recorded of it.

Every number of a step is a function of (seed, stage, step), so the same machine gives the same bits. Where it does not, a bit
was flipped in memory or on the way, a kernel is wrong on one of two machines, or one gives no two results alike. The step is
therefore compared with what the run recorded (checks.py, the checkpoint of that step), with itself, and layer by layer with
the plain torch of every op. A step that is not finite is traced to its first layer. Nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import cmt_kernels
import torch
from cmt_kernels.attention import small
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine import Engine, sums
from cmt_fast.engine.graph import eager
from cmt_fast.run import changes
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, exits, machine
from cmt_fast.storage import checkpoint
from cmt_fast.train import attention_choice, batches, checks, nonfinite, rounding_choice, starting, tracing
from cmt_fast.train.batches import BatchProvider


class Differs(FloatingPointError):
    """The step is finite, and is not what was recorded, or not near plain torch."""

    code = exits.FAILED


class Replayed(NamedTuple):
    """A step as it is now. found: {"loss", "gradient", "parameters"} as checks.py writes them; again: the loss of a pass
    before; traced: what each rank found, where it is not finite; recorded: lines of the run for this step, alike: those to which
    it came by steps that were laid out as these are; layout: how.

    worst: (layer, relative difference) of the first layer that has fewer than half of its digits in common with plain torch,
    None where there is none; dump: what the run wrote when the step was not finite; saved: of the checkpoint of that step, if it
    came from such steps.
    """

    step: int
    start: int
    found: dict[str, str]
    again: dict[str, str]
    traced: list[dict[str, Any]]
    recorded: list[dict[str, Any]]
    alike: list[dict[str, Any]]
    layout: str
    worst: tuple[str, float] | None
    dump: dict[str, Any] | None
    saved: str | None

    @property
    def differs(self) -> list[str]:
        """What of it is not as recorded."""
        wrong = [key for key in checks.KEYS if any(line.get(key) != self.found[key] for line in self.alike)]
        if self.saved and self.saved != self.found["parameters"] and "parameters" not in wrong:
            wrong.append("parameters")
        return wrong

    @property
    def sound(self) -> bool:
        """Whether it is finite, as recorded, twice the same, and near plain torch."""
        same = all(self.found[key] == value for key, value in self.again.items())
        return not self.traced and not self.differs and same and self.worst is None


def replay(work: Workspace, name: str, step: int) -> Replayed:
    """Step `step` of a stage, from 1 as rows of metrics count. Every rank must call it.

    Raises ConfigError for a step that the stage has not or cannot be reached, CheckpointError where no checkpoint is whole.
    """
    stage = changes.as_of(work.stage(name), step)
    if not 1 <= step <= stage.schedule.total:
        raise ConfigError(f"--step: {step} is no step of {name}; it has 1 to {stage.schedule.total:,}")
    found, config = _before(stage, step), stage.config
    if found is None and not (stage.folder / "metrics.jsonl").exists():
        raise ConfigError(f"RUN/STAGE: {stage.folder} has not begun")
    start = found.manifest["step"] if found else 0
    for at in (entry["step"] for entry in stage.changes if start < entry["step"]):
        raise ConfigError(
            f"--step: settings were changed at step {at:,}, and no checkpoint from there to step {step} is whole"
        )
    with contextlib.ExitStack() as ending:
        machine.allow_tf32(config.precision == "tf32")
        ending.callback(machine.allow_tf32, False)
        parts = stage.grad_accum_steps(distributed.size())
        engine = work.engine_of(stage, parts, work.sharding_plan(stage), found is not None)
        ending.callback(engine.close)
        starting.parent(work, config, engine, found is None)
        if found:
            starting.load(engine, found, stage)
        known = _any(stage)  # a stage that began at this step's start chose by time, and wrote down what
        ending.enter_context(small.using(attention_choice.settle(work, config, found or known)))
        source = batches.provider(work, stage, engine, None, found or known)
        ending.callback(source.close)
        source.rounding = rounding_choice.settle(stage, engine, source, _measured(stage, found, known))
        rollbacks = nonfinite.known_rollbacks(stage.folder, found or known)
        source.redraws = [(r["from"], r["redraw"]) for r in rollbacks]
        engine.skipped = len(nonfinite.skipped(found))
        left_out = json.loads(distributed.text_of_first(json.dumps(_left_out(stage, known, start, step))))
        return _replayed(stage, engine, source, step, checks.history(stage.changes, rollbacks, step), left_out)


def _before(stage: ResolvedStage, step: int) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint from which the step can be taken; None for the stage's start."""
    for at in reversed(checkpoint.steps(stage.folder)):
        if at < step:
            with contextlib.suppress(checkpoint.CheckpointError):
                return checkpoint.sized(checkpoint.folder_of(stage.folder, at))
    return None


def _any(stage: ResolvedStage) -> checkpoint.Checkpoint | None:
    with contextlib.suppress(checkpoint.CheckpointError):
        return checkpoint.newest(stage.folder)
    return None


def _measured(
    stage: ResolvedStage, found: checkpoint.Checkpoint | None, known: checkpoint.Checkpoint | None
) -> checkpoint.Checkpoint | None:
    """The checkpoint whose measurements of rounding the step was taken with; None where they were made anew, as they are now."""
    if found:
        return starting.measured(stage, found)
    same = known and not any(
        {"precision", "rounding_limit"} & entry["keys"].keys() for entry in known.manifest.get("changes", ())
    )
    return known if same else None


def _left_out(stage: ResolvedStage, known: checkpoint.Checkpoint | None, start: int, step: int) -> list[int]:
    """The steps between that the run skipped: what was not finite then may be finite now, and was no step all the same."""
    counted = known.manifest["step"] if known else 0
    dumps = {n: nonfinite.dump(stage.folder, n) for n in range(max(start, counted) + 1, step)}
    later = [n for n, found in dumps.items() if found and found.get("decided") == "skip"]
    return [n for n in [*nonfinite.skipped(known), *later] if start < n < step]


def _replayed(
    stage: ResolvedStage, engine: Engine, source: BatchProvider, step: int, history: str, left_out: list[int]
) -> Replayed:
    """left_out: steps before it that the run skipped."""
    start = engine.step_count
    for n in range(start, step - 1):
        if n + 1 in left_out or math.isnan(float(_taken(stage, engine, source, n)[1])):
            engine.skip(n + 1)
    last = step - 1
    drawn = [source.draw(last, part) for part in range(engine.grad_accum_steps)]
    again, worst = _again(engine, source, drawn), _worst(engine, source, drawn[0])
    found = tracing.traced(engine, lambda probe: lambda x: source.loss_of(probe, x), source.held, drawn.__getitem__)
    mine = {"rank": distributed.rank(), **found._asdict(), "loss": repr(found.loss)}
    traced = [json.loads(text) for text in tracing.texts_of_all(json.dumps(mine))]
    engine.checking = True
    loss, norm = _taken(stage, engine, source, last)
    mean = float(distributed.mean_(loss.double().clone()))
    now = {"loss": mean.hex()} | {key: sums.text(total) for key, total in engine.checks.items()}
    lost = bool(norm.isnan()) or any(r["forward"] or r["backward"] for r in traced)
    recorded, layout = checks.read(stage.folder, step, history), checks.layout(stage, engine)
    alike, last = checks.alike(stage.folder, start, step, distributed.size(), layout)
    return Replayed(
        step, start, {key: now.get(key, "") for key in checks.KEYS}, again, traced if lost else [], recorded,
        [line for line in recorded if line in alike], layout, worst, nonfinite.dump(stage.folder, step),
        _saved(stage.folder, step, engine, layout) if last else None,
    )  # fmt: skip


def _taken(stage: ResolvedStage, engine: Engine, source: BatchProvider, n: int) -> tuple[Tensor, Tensor]:
    """The step after n others, kernel by kernel: this rank's loss and the gradient's norm."""
    losses = []
    for part in range(engine.grad_accum_steps):
        given = eager(engine, lambda x: source.loss_of(engine, x), source.draw(n, part))
        losses.append(given["loss"].clone())
    return torch.stack(losses).mean(), engine.step(stage.schedule.lr(stage.config, n))


def _again(engine: Engine, source: BatchProvider, drawn: list[Any]) -> dict[str, str]:
    """The loss of the step's rows, forward alone, before the step is taken: it must come out the same then. {} under ZeRO,
    whose forwards and backwards come in pairs."""
    if not hasattr(engine, "share_half"):
        return {}
    losses = [source.loss_of(engine, part)[0].detach().clone() for part in drawn]
    return {"loss": float(distributed.mean_(torch.stack(losses).mean().double().clone())).hex()}


def _worst(engine: Engine, source: BatchProvider, drawn: Any) -> tuple[str, float] | None:
    """The first layer whose outputs have fewer than half of their digits in common with the same ops in plain torch."""
    probe = tracing.Probe(engine)
    run = lambda: tracing.outputs(probe.net, lambda: source.loss_of(probe, drawn))
    ours = run()
    with cmt_kernels.use("reference"):
        plain = run()
    digits = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.stage.products)
    eps = 2.0**-11 if engine.stage.products == "tf32" else torch.finfo(digits or torch.float32).eps
    first: tuple[str, float] | None = None
    for key, x in ours.items():
        y = plain.get(key)
        if first or y is None or x.shape != y.shape or not bool(x.isfinite().all() and y.isfinite().all()):
            continue
        apart = float((x - y).norm() / y.norm().clamp_min(1e-30))
        if apart > eps**0.5:
            first = key.partition("#")[0], apart
    probe.close()
    texts = tracing.texts_of_all(json.dumps(first))  # every rank has rows of its own
    return next((tuple(found) for found in map(json.loads, texts) if found), None)


def _saved(folder: Path, step: int, engine: Engine, layout: str) -> str | None:
    """The checksum of the parameters in the checkpoint of that step; None where there is none of this layout."""
    with contextlib.suppress(checkpoint.CheckpointError):
        found = checkpoint.sized(checkpoint.folder_of(folder, step))
        processes = (found.manifest.get("engine") or {}).get("processes", distributed.size())
        if (processes, found.manifest.get(checks.LAYOUT, layout)) != (distributed.size(), layout):
            return None
        tensors = found.tensors("model")
        return sums.text(sums.of_tensors(tensors[name] for name, _ in engine.net.named_parameters()))
    return None
