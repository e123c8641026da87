"""Few-step sampling of flow maps: consistency sampling on VE, jumps on linear flow."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import rollout, table

# ---------------------------------------------------------------------------------------------- few-step samplers


@torch.no_grad()
def sample_consistency(
    net: Net, x: Tensor, t_max: float, mid_times: tuple[float, ...], noises: list[Tensor], labels: Tensor | None
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023): x_0 = f(x, t_max); x_0 = f(x_0 + t z, t) for each mid time.

    x: (B, ...) noise of std t_max; noises: one (B, ...) per mid time. Returns (B, ...).
    """
    x_0 = net(x, *(torch.full((len(x),), t_max, dtype=x.dtype, device=x.device),) * 2, labels)
    for t, z in zip(mid_times, noises, strict=True):
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        x_0 = net(x_0 + t * z, times, times, labels)
    return x_0


@torch.no_grad()
def sample_jumps(net: Net, z: Tensor, steps: int, labels: Tensor | None) -> Tensor:
    """MeanFlow sampling: z_r = z_t - (t - r) u(z_t, r, t) on the uniform grid 1 -> 0. z: (B, ...) -> (B, ...)."""
    return rollout(
        net,
        ProbabilityPath("linear"),
        table(ProbabilityPath("linear"), "jump", steps, 1.0, 0.0),
        z,
        labels,
        dense=False,
    )
