"""Forward paths x_t = alpha(t) x_0 + sigma(t) eps, and the conversions between them.

VE (EDM): alpha = 1, sigma = t.  Linear flow: alpha = 1 - t, sigma = t, t in [0, 1], t = 1 noise.
TrigFlow (sCM): alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2].
Conversions are named a_to_b and return the state and the time on path b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cmt_kernels import path_point
from cmt_kernels.philox import Key
from torch import Tensor


def column(t: Tensor, like: Tensor) -> Tensor:
    """t: (B,) or scalar -> (B, 1, ...), broadcastable to like (B, ...), in its dtype."""
    t = torch.as_tensor(t, device=like.device).to(like.dtype)
    return t.view(-1, *[1] * (like.ndim - 1)) if t.ndim else t


class ProbabilityPath(NamedTuple):
    """One of the three paths, by name: "ve", "linear", "trig"."""

    name: str
    sigma_data: float = 0.5

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t: (B,) -> alpha, sigma and their derivatives in t, (B,) each."""
        if self.name == "ve":
            return torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t)
        if self.name == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        assert self.name == "trig", self.name
        s = self.sigma_data
        return torch.cos(t), s * torch.sin(t), -torch.sin(t), s * torch.cos(t)

    def point(self, x_0: Tensor, t: Tensor, key: Key, sample: Tensor) -> tuple[Tensor, Tensor]:
        """x_0: (B, ...), t: (B,), sample: (B,) row ids -> x_t and the conditional velocity d x_t / dt, (B, ...) each."""
        return path_point(x_0, *self.coefficients(t), key, sample)

    def velocity(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Velocity of the ODE from the denoised x_0 = D(x_t, t): alpha' x_0 + sigma' (x_t - alpha x_0)/sigma. (B, ...)."""
        alpha, sigma, alpha_dot, sigma_dot = (column(c, x_t) for c in self.coefficients(torch.as_tensor(t)))
        return alpha_dot * x_0 + sigma_dot * (x_t - alpha * x_0) / sigma

    def denoised(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """D(x_t, t) from the velocity, the inverse of `velocity`. (B, ...)."""
        alpha, sigma, alpha_dot, sigma_dot = (column(c, x_t) for c in self.coefficients(torch.as_tensor(t)))
        return (sigma_dot * x_t - sigma * v) / (sigma_dot * alpha - sigma * alpha_dot)


def ve_to_linear(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """VE (x, sigma) to linear flow (z, s): s = sigma / (1 + sigma), z = x / (1 + sigma)."""
    return x / column(1 + t, x), t / (1 + t)


def linear_to_ve(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Linear flow (z, s), s < 1, to VE (x, sigma): sigma = s / (1 - s), x = z / (1 - s)."""
    return z / column(1 - t, z), t / (1 - t)


def ve_to_trig(x: Tensor, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """VE (x, sigma) to TrigFlow: theta = atan(sigma / sigma_data), x' = cos(theta) x."""
    theta = torch.atan(t / sigma_data)
    return x * column(torch.cos(theta), x), theta


def trig_to_ve(x: Tensor, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """TrigFlow (x', theta), theta < pi/2, to VE: sigma = sigma_data tan(theta), x = x' / cos(theta)."""
    return x / column(torch.cos(t), x), sigma_data * torch.tan(t)


def linear_to_trig(z: Tensor, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Linear flow to TrigFlow: theta = atan2(t, (1 - t) sigma_data), x' = z / sqrt((1-t)^2 + (t / sigma_data)^2)."""
    scale = torch.sqrt((1 - t) ** 2 + (t / sigma_data) ** 2)
    return z / column(scale, z), torch.atan2(t, (1 - t) * sigma_data)


def trig_to_linear(x: Tensor, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """TrigFlow to linear flow: s = sigma/(alpha + sigma), z = x' / (alpha + sigma) with alpha = cos t, sigma = s_d sin t."""
    total = torch.cos(t) + sigma_data * torch.sin(t)
    return x / column(total, x), sigma_data * torch.sin(t) / total
