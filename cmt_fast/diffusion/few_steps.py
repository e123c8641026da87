"""Few-step sampling of flow maps: consistency sampling on VE, jumps on linear flow."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import rollout, table

# ---------------------------------------------------------------------------------------------- few-step samplers


@torch.no_grad()
def consistency_first(net: Net, x: Tensor, t_max: float, labels: Tensor | None) -> Tensor:
    """f(x, t_max), which is the sample of one step and where those of more steps go on. x: (B, ...) of std t_max -> (B, ...)."""
    return net(x, *(torch.full((len(x),), t_max, dtype=x.dtype, device=x.device),) * 2, labels)


@torch.no_grad()
def consistency_onwards(
    net: Net, x_0: Tensor, mid_times: tuple[float, ...], noises: list[Tensor], labels: Tensor | None
) -> Tensor:
    """x_0 = f(x_0 + t z, t) for each mid time, from the sample x_0 (B, ...) of one step; noises: one (B, ...) per mid time."""
    for t, z in zip(mid_times, noises, strict=True):
        times = torch.full((len(x_0),), t, dtype=x_0.dtype, device=x_0.device)
        x_0 = net(x_0 + t * z, times, times, labels)
    return x_0


def sample_consistency(
    net: Net, x: Tensor, t_max: float, mid_times: tuple[float, ...], noises: list[Tensor], labels: Tensor | None
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023): x_0 = f(x, t_max); x_0 = f(x_0 + t z, t) for each mid time.

    x: (B, ...) noise of std t_max; noises: one (B, ...) per mid time. Returns (B, ...).
    """
    return consistency_onwards(net, consistency_first(net, x, t_max, labels), mid_times, noises, labels)


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
