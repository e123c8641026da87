"""The loss scale of fp16: gradients times a power of two, so that small ones are not rounded to zero.

As of Micikevicius et al. 2018, arXiv 1710.03740. fp16 ends at 65,504 and begins at 6e-8. The loss is multiplied by the scale
before the backward pass, and gradients are divided by it in fp32 after it, which is exact, as the scale is a power of two.
Where a gradient is not finite on any rank, no rank takes the step: parameters, moments and EMA tracks stay, the step counts
as skipped, and the scale is halved; after GROWTH steps without one it is doubled. Scale, steps since it changed and skipped
steps are part of the checkpoint, so a run that goes on ends bit-equal. A loss that itself is not finite is no matter of the
scale, nor is a gradient at a scale of 1: these are what `on_nonfinite` of a run is for, as in every precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmt_fast.runtime import distributed

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWTH = 2000  # steps


class LossScale:
    """Of one engine. scale: (), on its device, where a CUDA graph of the step reads it."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST, device=device)
        self.lost = torch.zeros((), dtype=torch.bool, device=device)  # a loss of this step was not finite
        self.since = self.skipped = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        self.lost |= ~loss.detach().isfinite()
        return loss * self.scale

    def unscale(self, g: Tensor) -> Literal["taken", "skipped", "lost"]:
        """Divide gradients, summed over ranks, by the scale. Returns whether the step is to be taken, or skipped with half the
        scale, or is beyond help; waits for the device."""
        sound = bool(torch.isfinite(g.sum()) or torch.isfinite(g).all())  # a sum may overflow, its terms decide
        if sound:
            g.mul_(1.0 / self.scale)
        elif distributed.largest(int(self.lost)) or float(self.scale) == LEAST:
            self.lost.zero_()
            return "lost"
        self._after(sound)
        return "taken" if sound else "skipped"

    def _after(self, sound: bool) -> None:
        if not sound:
            self.scale.div_(2)
            self.since, self.skipped = 0, self.skipped + 1
            return
        self.since += 1
        if self.since == GROWTH:
            self.scale.mul_(2).clamp_(max=MOST)
            self.since = 0

    def told(self) -> dict[str, float]:
        """What a row of metrics says of it."""
        return {"loss_scale": float(self.scale), "skipped_steps": self.skipped}

    def state(self) -> Tensor:
        """(3,) float32, which holds them exactly: the scale, steps since it changed, skipped steps."""
        return torch.tensor([float(self.scale), self.since, self.skipped], dtype=torch.float32)

    def load(self, state: Tensor) -> None:
        """What `state` gave."""
        scale, since, skipped = state.tolist()
        self.scale.fill_(scale)
        self.since, self.skipped = int(since), int(skipped)
