"""What the rest of the trainer calls a network: one wrapper a path, shared by training and sampling.

`net(x, t, r, labels, drop)` is D(x, t) on VE (a denoiser, and the consistency function of the student)
and u(x, r, t) on linear flow (a velocity at r = t, an average velocity at r < t).
"""

from __future__ import annotations

import torch
from cmt_kernels import Dual
from cmt_kernels.dual import head, rows, tangent, value
from torch import Tensor, nn

from cmt_fast.paths import column


class Denoiser(nn.Module):
    """EDM preconditioning (Karras et al. 2022, table 1), input and output in fp32 or wider, for Tensor | Dual.

    D = c_skip x + c_out F(c_in x, ln(t)/4),  c_skip = s^2/(t^2 + s^2), c_out = t s/sqrt(t^2 + s^2), c_in = 1/sqrt(t^2 + s^2)
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor | Dual:
        """x: (B, ...), t: (B,) > 0; r is not read -> (B, ...) in the dtype of x. A plain argument is a constant."""
        x_v, t_v = value(x), value(t)
        total = t_v.square() + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, t_v * self.sigma_data * total.rsqrt(), total.rsqrt()
        scaled, c_noise = column(c_in, x_v) * x_v, t_v.log() / 4
        if isinstance(x, Dual) or isinstance(t, Dual):
            scaled, c_noise = self._inputs(x, t, scaled, c_noise)
        f = self.net(scaled, c_noise, None, labels, drop)
        d = column(c_skip, x_v) * x_v + column(c_out, x_v) * value(f).to(x_v.dtype)
        return Dual(d, self._tangent(x, t, f)) if isinstance(f, Dual) else d

    @torch.no_grad()
    def _inputs(self, x: Tensor | Dual, t: Tensor | Dual, scaled: Tensor, c_noise: Tensor) -> tuple[Dual, Dual]:
        """The network's inputs with their tangents: c_in' = -t c_in^3, c_noise' = 1/(4t)."""
        x_v, t_v, x_dot, t_dot = self._head(x, t)
        c_in = (t_v.square() + self.sigma_data**2).rsqrt()
        change = column(c_in, x_v) * x_dot - column(t_v * c_in**3 * t_dot, x_v) * x_v
        return Dual(scaled, change), Dual(c_noise, t_dot / (4 * t_v))

    @torch.no_grad()
    def _tangent(self, x: Tensor | Dual, t: Tensor | Dual, f: Dual) -> Tensor:
        """dD = c_skip dx + c_skip' x dt + c_out dF + c_out' F dt; c_skip' = -2 t s^2 c_in^4, c_out' = s^3 c_in^3. (k, ...)."""
        x_v, t_v, x_dot, t_dot = self._head(x, t)
        s, c_in = self.sigma_data, (t_v.square() + self.sigma_data**2).rsqrt()
        f_v, f_dot = f.value[: len(x_dot)].to(x_v.dtype), f.tangent.to(x_v.dtype)
        skip, out = -2 * t_v * s**2 * c_in**4 * t_dot, s**3 * c_in**3 * t_dot
        moved = column(s**2 * c_in**2, x_v) * x_dot + column(t_v * s * c_in, x_v) * f_dot
        return moved + column(skip, x_v) * x_v + column(out, x_v) * f_v

    @staticmethod
    def _head(x: Tensor | Dual, t: Tensor | Dual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first k rows of x and t, and their tangents, zero where one is a constant."""
        k = rows(x, t)
        x_v, t_v = head(x, k), head(t, k)
        x_dot, t_dot = tangent(x), tangent(t)
        return x_v, t_v, *(torch.zeros_like(v) if d is None else d for v, d in ((x_v, x_dot), (t_v, t_dot)))


class AverageVelocity(nn.Module):
    """u(z, r, t) on linear flow; r = None means r = t, the instantaneous velocity. Takes and gives Tensor | Dual."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        r: Tensor | Dual | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor | Dual:
        """x: (B, ...); t, r: (B,) in [0, 1] -> (B, ...), the value in fp32 or wider."""
        u = self.net(x, t, r, labels, drop)
        wide = lambda y: y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
        return Dual(wide(u.value), wide(u.tangent)) if isinstance(u, Dual) else wide(u)
