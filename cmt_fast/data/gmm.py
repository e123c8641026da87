"""A 2-D Gaussian mixture: denoiser, score and velocity in closed form, the flow map to any accuracy by its own ODE.

For p_0 = sum_k w_k N(mu_k, s^2 I) and x_t = alpha x_0 + sigma eps the posterior over components is a softmax, and

    E[x_0 | x_t] = sum_k p(k | x_t) (mu_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha mu_k)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmt_fast.config.schema import Gmm
from cmt_fast.data.rows import Dataset
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.solvers import rollout, table

_STAGE = 2**32 - 1  # of no training stage: the order of rows and their noise must not depend on what the rows are


def means(config: Gmm, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, 2): components evenly on a circle of `radius`."""
    angle = torch.arange(config.components, dtype=torch.float64) * (2 * math.pi / config.components)
    return (config.radius * torch.stack((angle.cos(), angle.sin()), dim=-1)).to(dtype)


def load(config: Gmm) -> Dataset:
    """x: (n, 2), no labels; the same rows for the same config."""
    ids = torch.arange(config.n)
    random = rng.Random(0, _STAGE, 0)
    component = random.integers(rng.DATA, ids, config.components)
    x = means(config)[component] + config.std * random.normal(rng.NOISE, ids, (2,))
    return Dataset(x, None, 0)


class Exact:
    """The closed-form network of a mixture on a path, with the trainer's call: net(x, t, r, labels)."""

    def __init__(self, config: Gmm, path: ProbabilityPath) -> None:
        self.config, self.path = config, path

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """m = sum_k p(k | x_t = x) mu_k (B, 2); alpha, sigma and v = alpha^2 s^2 + sigma^2, (B, 1) each."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        alpha, sigma, _, _ = self.path.coefficients(t)
        mu = means(self.config, x.dtype).to(x.device)
        variance = alpha**2 * self.config.std**2 + sigma**2
        logits = (mu @ x.T - alpha * mu.square().sum(-1, keepdim=True) / 2) * (alpha / variance)  # (K, B)
        return torch.softmax(logits, dim=0).T @ mu, *(column(c, x) for c in (alpha, sigma, variance))

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] = (alpha s^2 x + sigma^2 m) / v. x: (B, 2), t: (B,) -> (B, 2)."""
        m, alpha, sigma, variance = self._posterior(x, t)
        return (alpha * self.config.std**2 * x + sigma**2 * m) / variance

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """D(x, t) on VE, v(x, t) on linear flow: what a perfectly pre-trained network gives. (B, 2).

        The velocity is alpha' D + sigma' E[eps | x_t], E[eps | x_t] = sigma (x - alpha m) / v: finite at sigma = 0 too.
        """
        if self.path.name == "ve":
            return self.denoised(x, t)
        m, alpha, sigma, variance = self._posterior(x, t)
        _, _, alpha_dot, sigma_dot = (column(c, x) for c in self.path.coefficients(t.to(x.dtype)))
        d = (alpha * self.config.std**2 * x + sigma**2 * m) / variance
        return alpha_dot * d + sigma_dot * sigma * (x - alpha * m) / variance

    def flow_map(self, x: Tensor, t_from: float, t_to: float, steps: int = 400) -> Tensor:
        """Psi: the ODE's solution at t_to from x (B, 2) at t_from, by DPM-Solver++ of order 3 (VE) or Heun (linear)."""
        solver = "dpmpp" if self.path.name == "ve" else "heun"
        plan = table(self.path, solver, steps, t_from, t_to, order=3)
        return rollout(self, self.path, plan, x, dense=False)
