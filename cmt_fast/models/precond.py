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
        c_skip, c_out, c_in = self.scalings(t)
        f = self.raw(column(c_in, x) * x, t, r, labels, drop, seeds)
        d = column(c_skip, x) * x + column(c_out, x) * f.to(x.dtype)
        return (d, self.net.log_variance(t.log() / 4)) if uncertainty else d

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times t, shaped like t."""
        total = t.square() + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt(), total.rsqrt()

    def raw(
        self,
        x_in: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """F of the scaled input x_in = c_in x, in the network's own dtype: what a fused solver step takes."""
        return self.net(x_in, t.log() / 4, None, labels, drop, *([] if seeds is None else [seeds]))


class NoiseDenoiser(nn.Module):
    """D = x - t eps(x/sqrt(1 + t^2), n(t)) on VE, for a network that predicts the noise of DDPM's steps n = 0..999.

    n(t) is the step of noise t, t_n = sqrt((1 - a_n)/a_n), a_n the product of 1 - beta with beta from 1e-4 to 0.02 (Ho et
    al. 2020), linear in ln t between steps and constant outside of [0.01, 157].
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.dropouts = getattr(net, "dropouts", 0)
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        self.register_buffer("log_noise", ((1 - kept) / kept).sqrt().log(), persistent=False)

    def step_of(self, t: Tensor) -> Tensor:
        """t: (B,) > 0 -> n(t) (B,) in [0, 999]."""
        x, table = t.double().log(), self.log_noise.double()
        i = torch.searchsorted(table, x).clamp(1, 999)
        n = i - 1 + (x - table[i - 1]) / (table[i] - table[i - 1])
        return n.clamp(0, 999).to(t.dtype)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """x: (B, ...), t: (B,) > 0; r is not read; seeds as in a Denoiser -> (B, ...) in the dtype of x."""
        _, c_out, c_in = self.scalings(t)
        return x + column(c_out, x) * self.raw(column(c_in, x) * x, t, r, labels, drop, seeds).to(x.dtype)

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times t, as a Denoiser's."""
        return torch.ones_like(t), -t, torch.rsqrt(1 + t.square())

    def raw(
        self,
        x_in: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """The predicted noise for the scaled input, as a Denoiser's."""
        return self.net(x_in, self.step_of(t), None, labels, drop, *([] if seeds is None else [seeds]))


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
