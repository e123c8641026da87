"""What the rest of the trainer calls a network: one wrapper a path, shared by training and sampling.

`net(x, t, r, labels, drop, seeds)` is D(x, t) on VE (a denoiser, and the consistency function of the student)
and u(x, r, t) on linear flow (a velocity at r = t, an average velocity at r < t). Networks with dropout apply it when
they are given seeds, which only training does: two calls with the same seeds drop the same activations. `augment=` tells a
network that knows it what was done to its images, by name, and in training alone.
"""

from __future__ import annotations

from typing import Any

import torch
from cmt_kernels import Dual
from cmt_kernels.dual import head, rows, tangent, value
from torch import Tensor, nn

from cmt_fast.diffusion.paths import column


class Denoiser(nn.Module):
    """EDM preconditioning (Karras et al. 2022, table 1), input and output in fp32 or wider, for Tensor | Dual.

    D = c_skip x + c_out F(c_in x, ln(t)/4),  c_skip = s^2/(t^2 + s^2), c_out = t s/sqrt(t^2 + s^2), c_in = 1/sqrt(t^2 + s^2)
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net, self.sigma_data = net, sigma_data
        self.dropouts = getattr(net, "dropouts", 0)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
        uncertainty: bool = False,
        *,
        augment: Tensor | None = None,
    ) -> Tensor | Dual | tuple[Tensor | Dual, Tensor]:
        """x: (B, ...), t: (B,) > 0; r is not read; seeds: (B, dropouts, 2) of a training step -> (B, ...) in the dtype of x.

        augment: (B, n) labels of what was done to the rows, for a network that knows them; None where nothing was, as always
        outside of training.

        A plain argument is a constant. With `uncertainty` also the network's log variance u(t) (B,), which has no tangent: EDM2's
        networks have one, others by `model.log_variance`.
        """
        x_v, t_v = value(x), value(t)
        c_skip, c_out, c_in = self.scalings(t_v)
        scaled, c_noise = column(c_in, x_v) * x_v, t_v.log() / 4
        if isinstance(x, Dual) or isinstance(t, Dual):
            rate = torch.reciprocal(4 * head(t, rows(x, t)))
            scaled, c_noise = _inputs(x, t, self.sigma_data, scaled, c_noise, rate)
        f = self._network(scaled, c_noise, labels, drop, seeds, augment)
        d = column(c_skip, x_v) * x_v + column(c_out, x_v) * value(f).to(x_v.dtype)
        out = Dual(d, self._tangent(x, t, f)) if isinstance(f, Dual) else d
        return (out, self.net.log_variance(value(c_noise))) if uncertainty else out

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times t, shaped like t."""
        total = t.square() + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt(), total.rsqrt()

    def raw(
        self, x_in: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """F of the scaled input x_in = c_in x, in the network's own dtype: what a fused solver step takes."""
        return self._network(x_in, t.log() / 4, labels, drop, None)

    def _network(self, scaled, c_noise, labels, drop, seeds, augment: Tensor | None = None):
        told = {} if augment is None else {"augment": augment}
        return self.net(scaled, c_noise, None, labels, drop, *([] if seeds is None else [seeds]), **told)

    @torch.no_grad()
    def _tangent(self, x: Tensor | Dual, t: Tensor | Dual, f: Dual) -> Tensor:
        """dD = c_skip dx + c_skip' x dt + c_out dF + c_out' F dt; c_skip' = -2 t s^2 c_in^4, c_out' = s^3 c_in^3. (k, ...)."""
        x_v, t_v, x_dot, t_dot = _heads(x, t)
        s, c_in = self.sigma_data, (t_v.square() + self.sigma_data**2).rsqrt()
        f_v, f_dot = f.value[: len(x_dot)].to(x_v.dtype), f.tangent.to(x_v.dtype)
        skip, out = -2 * t_v * s**2 * c_in**4 * t_dot, s**3 * c_in**3 * t_dot
        moved = column(s**2 * c_in**2, x_v) * x_dot + column(t_v * s * c_in, x_v) * f_dot
        return moved + column(skip, x_v) * x_v + column(out, x_v) * f_v


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
        return self._step(t)[0]

    def _step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """n(t) and dn/dt, 0 outside. (B,), (B,)."""
        x, table = t.double().log(), self.log_noise.double()
        i = torch.searchsorted(table, x).clamp(1, 999)
        slope = 1 / (table[i] - table[i - 1])
        n = i - 1 + (x - table[i - 1]) * slope
        inside = (n >= 0) & (n <= 999)
        return n.clamp(0, 999).to(t.dtype), slope.masked_fill(~inside, 0).to(t.dtype) / t

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
        uncertainty: bool = False,
    ) -> Tensor | Dual | tuple[Tensor | Dual, Tensor]:
        """x: (B, ...), t: (B,) > 0; r is not read; seeds, uncertainty as in a Denoiser -> (B, ...) in the dtype of x."""
        x_v, t_v = value(x), value(t)
        _, c_out, c_in = self.scalings(t_v)
        scaled, n = column(c_in, x_v) * x_v, self.step_of(t_v)
        if isinstance(x, Dual) or isinstance(t, Dual):
            scaled, n = _inputs(x, t, 1.0, scaled, n, self._step(head(t, rows(x, t)))[1])
        eps = self._network(scaled, n, labels, drop, seeds)
        d = x_v + column(c_out, x_v) * value(eps).to(x_v.dtype)
        out = Dual(d, self._tangent(x, t, eps)) if isinstance(eps, Dual) else d
        return (out, self.net.log_variance(t_v.log() / 4)) if uncertainty else out

    @torch.no_grad()
    def _tangent(self, x: Tensor | Dual, t: Tensor | Dual, eps: Dual) -> Tensor:
        """dD = dx - eps dt - t d eps. (k, ...)."""
        x_v, t_v, x_dot, t_dot = _heads(x, t)
        eps_v, eps_dot = eps.value[: len(x_dot)].to(x_v.dtype), eps.tangent.to(x_v.dtype)
        return x_dot - column(t_dot, x_v) * eps_v - column(t_v, x_v) * eps_dot

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times t, as a Denoiser's."""
        return torch.ones_like(t), -t, torch.rsqrt(1 + t.square())

    def raw(
        self, x_in: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """The predicted noise for the scaled input, as a Denoiser's."""
        return self._network(x_in, self.step_of(t), labels, drop, None)

    def _network(self, scaled, n, labels: Tensor | None, drop: Tensor | None, seeds: Tensor | None):
        return self.net(scaled, n, None, labels, drop, *([] if seeds is None else [seeds]))


def _heads(x: Tensor | Dual, t: Tensor | Dual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first k rows of x and t, and their tangents, zero where one is a constant."""
    k = rows(x, t)
    x_v, t_v = head(x, k), head(t, k)
    x_dot, t_dot = tangent(x), tangent(t)
    return x_v, t_v, *(torch.zeros_like(v) if d is None else d for v, d in ((x_v, x_dot), (t_v, t_dot)))


@torch.no_grad()
def _inputs(
    x: Tensor | Dual, t: Tensor | Dual, spread: float, scaled: Tensor, noise: Tensor, rate: Tensor
) -> tuple[Dual, Dual]:
    """The network's inputs with their tangents: c_in = 1/sqrt(t^2 + spread^2), c_in' = -t c_in^3; rate: d noise / dt (k,)."""
    x_v, t_v, x_dot, t_dot = _heads(x, t)
    c_in = (t_v.square() + spread**2).rsqrt()
    change = column(c_in, x_v) * x_dot - column(t_v * c_in**3 * t_dot, x_v) * x_v
    return Dual(scaled, change), Dual(noise, t_dot * rate)


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
        also: bool = False,
        guide: Tensor | None = None,
        *,
        augment: Tensor | None = None,
    ) -> Tensor | Dual | tuple[Tensor | Dual, Tensor]:
        """x: (B, ...); t, r: (B,) in [0, 1]; seeds: (B, dropouts, 2); augment as of a Denoiser -> (B, ...), the value in fp32
        or wider.

        guide: (B, 3), guidance scale and interval of each row, for a network that is told them (None: no guidance). also: with
        the velocity by its auxiliary head, (B, ...), which has no tangent.

        Many parameters: what any loss or sampler tells a network, in one call.
        """
        more: dict[str, Any] = {"also": True} if also else {}
        more |= {} if guide is None else {"guide": guide}
        more |= {} if augment is None else {"augment": augment}
        u = self.net(x, t, r, labels, drop, *([] if seeds is None else [seeds]), **more)
        wide = lambda y: y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
        u, v = u if also else (u, None)
        u = Dual(wide(u.value), wide(u.tangent)) if isinstance(u, Dual) else wide(u)
        return (u, wide(v)) if also else u
