"""The optimizer that DeepSpeed hosts: `adamw_ema` on whatever flat partitions it puts into its parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from cmt_kernels import adamw_ema
from torch import Tensor, nn

from cmt_fast.config.schema import Stage
from cmt_fast.engine import ema, optimizer


class Host(Protocol):
    """What the optimizer reads of the engine that it serves, and where it leaves the checksum of a step's gradient.

    whole: all parameters in one buffer, at ZeRO's stage 0; checking: whether this step's checksums are asked for.
    """

    net: nn.Module
    stage: Stage
    level: int
    whole: Tensor
    step_count: int
    skipped: int
    checking: bool
    checks: dict[str, Tensor]

    def partial_sum(self, of: Callable[[Tensor], Tensor | None]) -> Tensor:
        """The checksum of this rank's parts of what `of` gives for each partition."""


class AdamWEma(torch.optim.Optimizer):
    """`adamw_ema` on whatever flat partitions DeepSpeed puts into its parameter groups."""

    def __init__(self, parameters: Any, engine: Host) -> None:
        super().__init__(parameters, {})
        self.engine, self.lr, self.norm = engine, 0.0, torch.zeros(())

    def allocate(self, partition: Tensor) -> None:
        """Moments at zero, EMA tracks at the weights; all live as long as the partition."""
        flat = partition.detach()
        zeros = {"m": torch.zeros_like(flat), "v": torch.zeros_like(flat)}
        self.state[partition] = zeros | {f"ema-{i}": flat.clone() for i in range(len(self.engine.stage.ema))}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every partition that has a gradient."""
        engine = self.engine
        if engine.level == 0:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.engine.net.parameters()]
            whole = torch.cat([g.reshape(-1) for g in grads])
            if engine.checking:
                engine.checks = {"gradient": engine.partial_sum(lambda flat: whole)}
            self.norm = self._update(engine.whole, whole, engine.stage.grad_clip_norm)
            return
        if engine.checking:  # stage 3 may step its partition in parts, and has the gradient of one alone
            engine.checks = {"gradient": engine.checks.get("gradient", 0) + engine.partial_sum(lambda flat: flat.grad)}
        for p in [p for group in self.param_groups for p in group["params"] if p.grad is not None]:
            self._update(p, p.grad, 0.0)

    def _update(self, p: Tensor, g: Tensor, clip: float) -> Tensor:
        s, n, own = self.engine.stage, self.engine.step_count - self.engine.skipped, self.state[p]
        lr, eps, decay = optimizer.settings(s, n, self.lr)
        tracks, decays = [own[f"ema-{i}"] for i in range(len(s.ema))], [ema.beta(profile, n) for profile in s.ema]
        return adamw_ema(p.data, g, own["m"], own["v"], tracks, decays, n, lr, s.betas, eps, decay, clip)
