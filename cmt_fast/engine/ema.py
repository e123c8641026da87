"""EMA profiles, and the reconstruction of a profile that was not tracked (Karras et al. 2024, EDM2, sec. 3 and app. C)."""

from __future__ import annotations

import numpy as np

from cmt_fast.config.schema import ConstantEma, PowerEma


def beta(profile: ConstantEma | PowerEma, step: int) -> float:
    """The decay at optimizer step `step` (from 1).

    Constant: min(beta, (1 + n)/(10 + n)), or beta at once without the ramp. Power: (1 - 1/n)^(gamma + 1) (EDM2, eq. 127).
    """
    if isinstance(profile, ConstantEma):
        return min(profile.beta, (1 + step) / (10 + step)) if profile.ramp else profile.beta
    return (1 - 1 / step) ** (gamma(profile.sigma_rel) + 1)


def gamma(sigma_rel: float) -> float:
    """Exponent of the power profile with relative width sigma_rel, 0 < sigma_rel < 0.29 (EDM2, eq. 123).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for its largest real root.
    """
    c = sigma_rel**-2
    return float(np.roots([1, 7, 16 - c, 12 - c]).real.max())


def inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of power profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (EDM2, eq. 151).

    t_a, gamma_a: (n,); t_b, gamma_b: (m,) -> (n, m).
    """
    t_a, gamma_a = t_a[:, None].astype(float), gamma_a[:, None]
    t_b, gamma_b = t_b[None].astype(float), gamma_b[None]
    ratio = t_a / t_b
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def reconstruction_weights(steps: list[int], sigma_rels: list[float], step: int, sigma_rel: float) -> np.ndarray:
    """Least-squares weights of saved snapshots that best give the profile (step, sigma_rel), over their sum.

    steps, sigma_rels: (n,) of the snapshots -> (n,) weights that sum to 1, as NVlabs/edm2's `solve_posthoc_coefficients`
    makes them: an average of snapshots, under which what is the same in all of them stays what it is. Without that, few
    snapshots leave part of the profile out (the least-squares sum is .82 to .9995). Raises ValueError without snapshots.
    """
    if not steps:
        raise ValueError("no snapshots of a power-function EMA are stored")
    t, g = np.array(steps, dtype=float), np.array([gamma(s) for s in sigma_rels])
    target = np.array([float(step)]), np.array([gamma(sigma_rel)])
    weights = np.linalg.lstsq(inner(t, g, t, g), inner(t, g, *target), rcond=None)[0][:, 0]
    return weights / weights.sum()
