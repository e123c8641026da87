"""A 2-D Gaussian mixture: denoiser, score and velocity in closed form, the flow map to any accuracy by its own ODE.

For p_0 = sum_k w_k N(mu_k, s^2 I) and x_t = alpha x_0 + sigma eps the posterior over components is a softmax, and

    E[x_0 | x_t] = sum_k p(k | x_t) (mu_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha mu_k)).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from cmt_fast import rng
from cmt_fast.data import Dataset
from cmt_fast.paths import Path, column
from cmt_fast.schema import Gmm
from cmt_fast.solvers import rollout, table


def means(config: Gmm, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, 2): components evenly on a circle of `radius`."""
    angle = torch.arange(config.components, dtype=torch.float64) * (2 * math.pi / config.components)
    return (config.radius * torch.stack((angle.cos(), angle.sin()), dim=-1)).to(dtype)


def load(config: Gmm) -> Dataset:
    """x: (n, 2), no labels; the same rows for the same config."""
    ids = torch.arange(config.n)
    random = rng.Random(0, 0, 0)
    component = random.integers(rng.DATA, ids, config.components)
    x = means(config)[component] + config.std * random.normal(rng.NOISE, ids, (2,))
    return Dataset(x, None, 0)


class Exact:
    """The closed-form network of a mixture on a path, with the trainer's call: net(x, t, r, labels)."""

    def __init__(self, config: Gmm, path: Path) -> None:
        self.config, self.path = config, path

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x] and E[eps | x] = sigma / variance (x - alpha m), m the posterior mean of mu_k; finite at sigma = 0."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        alpha, sigma, _, _ = self.path.coefficients(t)
        mu, s2 = means(self.config, x.dtype).to(x.device), self.config.std**2
        variance = alpha**2 * s2 + sigma**2
        logits = (mu @ x.T - alpha * mu.square().sum(-1, keepdim=True) / 2) * (alpha / variance)  # (K, B)
        m = torch.softmax(logits, dim=0).T @ mu
        d = column(alpha * s2 / variance, x) * x + column(sigma**2 / variance, x) * m
        return d, column(sigma / variance, x) * (x - column(alpha, x) * m)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x]. x: (B, 2), t: (B,) -> (B, 2)."""
        return self._parts(x, t)[0]

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """D(x, t) on VE, v(x, t) on linear flow: what a perfectly pre-trained network gives. (B, 2)."""
        d, eps = self._parts(x, t)
        if self.path.name == "ve":
            return d
        _, _, alpha_dot, sigma_dot = (column(c, x) for c in self.path.coefficients(t.to(x.dtype)))
        return alpha_dot * d + sigma_dot * eps

    def flow_map(self, x: Tensor, t_from: float, t_to: float, steps: int = 400) -> Tensor:
        """Psi: the ODE's solution at t_to from x (B, 2) at t_from, by DPM-Solver++ of order 3 (VE) or Heun (linear)."""
        solver = "dpmpp" if self.path.name == "ve" else "heun"
        plan = table(self.path, solver, steps, t_from, t_to, order=3)
        return rollout(self, self.path, plan, x, dense=False)
