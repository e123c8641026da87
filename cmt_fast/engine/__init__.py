"""Engines: forward in a stage's precision, backward, one optimizer step with its EMA tracks, and their state.

`local` is plain torch: every process holds everything, gradients are averaged over processes. `zero` is DeepSpeed's
ZeRO: optimizer state, EMA, gradients and parameters sharded over processes as far as its stage says. Both are the
same mathematics, the same calls and the same checkpoint, so a run may change its engine or its number of processes
between two checkpoints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run, Stage
from cmt_fast.engine import graph
from cmt_fast.engine.buffers import Unread, load_named, named
from cmt_fast.engine.local import LocalEngine
from cmt_fast.engine.sharding import ShardingPlan, StageSize, choose
from cmt_fast.engine.snapshot import Snapshot
from cmt_fast.runtime import progress


class Engine(Protocol):
    """What the training loop knows of an engine. On several processes every rank makes every call, in the same order."""

    net: nn.Module
    stage: Stage
    step_count: int
    grad_accum_steps: int
    skipped: int  # steps that were not finite: the optimizer's count is step_count without them
    checking: bool  # whether the next steps leave in `checks` the checksums of gradient and parameters, as of sums.py
    checks: dict[str, Tensor]

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The module's forward in the stage's precision."""

    def eager(self, *args: Any, wide: bool = False, **named: Any) -> Any:
        """The same forward, never compiled; wide: in fp32."""

    def wide(self, *args: Any, **named: Any) -> Any:
        """The module's forward in fp32, whatever the stage's precision is."""

    def scaling(self) -> dict[str, float]:
        """What rows of metrics say of the loss's scale; nothing where there is none."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one of the step's `grad_accum_steps` losses; their mean is differentiated."""

    def step(self, lr: float) -> Tensor:
        """Average over ranks, clip, AdamW, EMAs, weight constraints. Returns the gradient's norm before clipping, ().

        Where the gradient is not finite on any rank nothing changes on all of them, and the norm is NaN. Until `skip` no later
        step needs to change anything either.
        """

    def skip(self, step: int) -> None:
        """Go on after `step` steps, the last of which was not finite: for the optimizer it was none."""

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take a parent's weights: student and every EMA track start there."""

    def average(self, index: int = 0) -> nn.Module:
        """A frozen fp32 module of EMA track `index`, whole on every rank."""

    def copy(self) -> nn.Module:
        """A module of its own with the student's present weights, whole on every rank."""

    def frozen(self, net: nn.Module | Unread) -> Any:
        """A teacher as this engine holds it: a callable with the arguments of `net`, whole or sharded over ranks."""

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything a restart needs, file name -> full tensors by name."""

    def snapshot_bytes(self) -> int:
        """Of host memory, that a whole snapshot takes on this rank."""

    def snapshot(self, files: Collection[str] | None = None) -> Snapshot:
        """The same as it is now, this rank's part copied to the host: written while steps go on. files: those alone."""

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Restore what `state` of any engine on any number of processes gave after `step` steps."""

    def close(self) -> None:
        """Let go of all memory, that of tracks which `average` gave apart: no step comes after it, another engine may."""


def check(run: Run, name: str, stage: Stage, choice: ShardingPlan, device: torch.device) -> None:
    """Raises ConfigError where the engine of a run cannot be had, or cannot do what a stage asks for on this device."""
    if stage.precision == "bf16-stream" and run.model.kind != "dit":
        raise ConfigError(
            f"'bf16-stream' is of a residual stream of tokens, a dit has one; with {run.model.kind} take 'bf16'",
            f"{name}.precision",
        )
    why = graph.obstacle(run.engine, device)
    if stage.cuda_graph is True and why:
        raise ConfigError(f"the step cannot be a CUDA graph: {why}", f"{name}.cuda_graph")
    if run.engine == "local":
        return
    if stage.products == "fp16":
        raise ConfigError(
            "'fp16' scales its loss, which only the engine 'local' does; with 'zero' take 'bf16'", f"{name}.precision"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("'zero' needs DeepSpeed; pip install 'cmt-fast[zero]'", "engine")
    if stage.compile and choice.stage == 3:
        raise ConfigError(
            "ZeRO stage 3 gathers weights inside the network, which is no single graph", f"{name}.compile"
        )


@progress.phase("building the engine", quiet=True)
def build(
    run: Run, net: nn.Module, stage: Stage, device: torch.device, grad_accum_steps: int, choice: ShardingPlan,
    numbers: Iterable[tuple[str, Tensor]] = (),
) -> Engine:  # fmt: skip
    """The engine a run asks for, as `choose` sized it and `check` let it pass.

    net: with its weights, or without memory; numbers: what such a one begins with, (name, tensor), zeros where nothing is
    said.
    """
    if run.engine == "local":
        return LocalEngine(net, stage, device, grad_accum_steps, numbers=numbers)
    from cmt_fast.engine.zero import ZeroEngine

    return ZeroEngine(net, stage, device, grad_accum_steps, choice, numbers)


__all__ = [
    "Engine",
    "LocalEngine",
    "ShardingPlan",
    "Snapshot",
    "StageSize",
    "Unread",
    "build",
    "check",
    "choose",
    "load_named",
    "named",
]
