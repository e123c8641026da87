"""What the rest of the trainer calls a network: one wrapper a path, shared by training and sampling.

`net(x, t, r, labels, drop)` is D(x, t) on VE (a denoiser, and the consistency function of the student)
and u(x, r, t) on linear flow (a velocity at r = t, an average velocity at r < t).
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

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """x: (B, ...), t: (B,) > 0; r is not read -> (B, ...) in the dtype of x."""
        c_skip, c_out, c_in = self.scalings(t)
        f = self.raw(column(c_in, x) * x, t, r, labels, drop)
        return column(c_skip, x) * x + column(c_out, x) * f.to(x.dtype)

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times t, shaped like t."""
        total = t.square() + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt(), total.rsqrt()

    def raw(
        self, x_in: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """F of the scaled input x_in = c_in x, in the network's own dtype: what a fused solver step takes."""
        return self.net(x_in, t.log() / 4, None, labels, drop)


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
