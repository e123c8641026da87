"""What the rest of the trainer calls a network: one wrapper a path, shared by training and sampling.

`net(x, t, r, labels, drop, seeds)` is D(x, t) on VE (a denoiser, and the consistency function of the student)
and u(x, r, t) on linear flow (a velocity at r = t, an average velocity at r < t). Networks with dropout apply it when
they are given seeds, which only training does: two calls with the same seeds drop the same activations.
"""

from __future__ import annotations

import torch
from cmt_kernels import Dual
from torch import Tensor, nn

from cmt_fast.paths import column


class Denoiser(nn.Module):
    """EDM preconditioning (Karras et al. 2022, table 1), input and output in fp32 or wider.

    D = c_skip x + c_out F(c_in x, ln(t)/4),  c_skip = s^2/(t^2 + s^2), c_out = t s/sqrt(t^2 + s^2), c_in = 1/sqrt(t^2 + s^2)
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net, self.sigma_data = net, sigma_data
        self.dropouts = getattr(net, "dropouts", 0)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
        uncertainty: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, ...), t: (B,) > 0; r is not read; seeds: (B, dropouts, 2) of a training step -> (B, ...) in the dtype of x.

        With `uncertainty` also the network's log variance u(t) (B,), which EDM2's networks have.
        """
        total = t.square() + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt(), total.rsqrt()
        c_noise = t.log() / 4
        f = self.net(column(c_in, x) * x, c_noise, None, labels, drop, *([] if seeds is None else [seeds]))
        d = column(c_skip, x) * x + column(c_out, x) * f.to(x.dtype)
        return (d, self.net.log_variance(c_noise)) if uncertainty else d


class AverageVelocity(nn.Module):
    """u(z, r, t) on linear flow; r = None means r = t, the instantaneous velocity. Takes and gives Tensor | Dual."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.dropouts = getattr(net, "dropouts", 0)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor | Dual:
        """x: (B, ...); t, r: (B,) in [0, 1]; seeds: (B, dropouts, 2) -> (B, ...), the value in fp32 or wider."""
        u = self.net(x, t, r, labels, drop, *([] if seeds is None else [seeds]))
        wide = lambda y: y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
        return Dual(wide(u.value), wide(u.tangent)) if isinstance(u, Dual) else wide(u)
