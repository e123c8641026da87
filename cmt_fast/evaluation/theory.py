"""The paper's theory in numbers: the solver's order, and the gradient bias of an objective by its initialisation.

The world is a Gaussian mixture on VE, where the denoiser D is closed form and the flow map Psi is as exact as one
likes. The oracle loss regresses f(x_t, t) on Psi_{t->0}(x_t), the consistency loss on sg f(x_r, r), r < t. With
J = df/dtheta at (x_t, t) their gradients differ by the bias

    grad L_CM - grad L_oracle = -2 E[ J^T e ],   e = f(x_r, r) - Psi_{t->0}(x_t),   B = || 2 E[ J^T e ] ||^2.

So B <= 4 L_J^2 E||e||^2: it is small when f starts near Psi (mid-training) and x_r stays near the trajectory through
x_t (small dt/t = 1/q, or a teacher's step). It has a floor where f starts as the posterior mean D, however small dt.
Here f = f_init + c_out(t) W phi, phi_j = cos(w_j . (c_in x, ln(t)/4) + b_j) / 8, so J = c_out(t) phi for every f_init.
Psi ends at t = .002, like the solver's trajectories. All in float64; E is a mean over the same samples everywhere,
which leaves a Monte-Carlo floor of about E||e||^2 / samples in B.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import solver_step
from torch import Tensor

from cmt_fast.config.schema import Gmm
from cmt_fast.data.gmm import Exact, means
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table, update, ve_step
from cmt_fast.objectives.consistency import earlier_time

# E||x_0||^2 = radius^2 + 2 std^2 = .298: modes that overlap, so that N = 32 steps are asymptotic.
MIXTURE = Gmm(components=6, radius=0.416, std=0.25)
T_MAX, T_MIN, MEAN, STD, T_LOW = 80.0, 0.002, -1.1, 2.0, 0.01
ORACLE_STEPS = 1500  # for ln(80 / .002); a shorter way takes proportionally fewer
FEATURES, CHUNK, FINE_Q = 64, 4000, 4096

NFE = (8, 16, 32, 64, 128)
ASYMPTOTIC = 32
CT_Q, EULER_Q, HEUN_Q, CMT_N = (64, 256, 1024, 4096), (8, 16, 32), (4, 8, 16), (16, 32, 64)
EPSILON = (1e-4, 1e-3, 1e-2)


class Draws(NamedTuple):
    """x_t = x_0 + t eps: x_0, eps, x_t (n, 2); t (n,), ascending."""

    x_0: Tensor
    eps: Tensor
    x_t: Tensor
    t: Tensor

    def data_point(self, q: float) -> tuple[Tensor, Tensor]:
        """ECT's pair with dt/t = 1/q (k = 0): x_r = x_0 + r eps, and r."""
        r = earlier_time(self.t, q, 0.0, 1.0)
        return self.x_0 + column(r, self.eps) * self.eps, r

    def stepped(self, net: Exact, q: float, method: str) -> tuple[Tensor, Tensor]:
        """The teacher's step from x_t to r, and r."""
        r = earlier_time(self.t, q, 0.0, 1.0)
        return ve_step(net, self.x_t, self.t, r, None, method), r


def measure(samples: int = 20000, seed: int = 0) -> dict[str, Any]:
    """Solver error by network calls, MSE = E||e||^2 and B by initialisation, with log-log slopes by least squares.

    Solver: RMS distance of the endpoint to the oracle's, both from the same prior noise; slopes are fitted where they
    are asymptotic, N >= 32. The nominal order 3 converges like 2: the ladder's first and last steps are of low order.
    """
    clock = time.perf_counter()
    path = ProbabilityPath("ve")
    net = Exact(MIXTURE, path)
    out = {"solver": _solver(net, path, samples, seed)}
    _say(f"solver order, {time.perf_counter() - clock:.0f} s")
    out["bias"] = _bias(net, path, samples, seed, clock)
    return out


def as_text(figures: dict[str, Any]) -> str:
    """The figures as plain tables."""
    solver = figures["solver"]
    lines = ["Endpoint RMS error of DPM-Solver++ by network calls, from noise (slopes for N >= 32; expected 1, 2, 2)"]
    lines.append(f"{'order':<28}" + "".join(f"{'N=' + str(n):>10}" for n in solver["nfe"]) + f"{'slope':>10}")
    for order, rms in solver["rms"].items():
        lines.append(f"{order:<28}" + "".join(f"{v:10.2e}" for v in rms) + f"{solver['slopes'][order]:10.2f}")
    lines += ["", "Gradient bias B = ||2 E[J^T (f(x_r, r) - Psi(x_t))]||^2 and MSE = E||f(x_r, r) - Psi(x_t)||^2"]
    for name, row in figures["bias"].items():
        shown = [f"{x:g}" if row["swept"] == "eps" else f"1/{1 / x:g}" for x in row["x"]]
        lines += ["", f"{name} (expected: {row['expected']})"]
        lines.append(f"  {row['swept']:<26}" + "".join(f"{x:>10}" for x in shown) + f"{'slope':>10}")
        for key in ("mse", "bias"):
            lines.append(f"  {key:<26}" + "".join(f"{v:10.2e}" for v in row[key]) + f"{row['slope_' + key]:10.2f}")
    return "\n".join(lines)


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    a, b = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a * a).sum())


def coefficients(ratio: Tensor, order: int) -> Tensor:
    """`solvers.dpmpp_coefficients` on VE for equal steps in log t, a row each: ratio = s/t (B,) -> (B, 4)."""
    h, p1, zero = -ratio.log(), ratio - 1, torch.zeros_like(ratio)
    if order == 1:
        return torch.stack((ratio, -p1, zero, zero), dim=-1)
    if order == 2:
        return torch.stack((ratio, -1.5 * p1, 0.5 * p1, zero), dim=-1)
    p2 = p1 / h + 1
    p3 = p2 / h - 0.5
    return torch.stack((ratio, -p1 + 1.5 * p2 - 0.5 * p3, p3 - 2 * p2, 0.5 * (p2 - p3)), dim=-1)


def solve(net: Exact, x: Tensor, t: Tensor, steps: int, order: int = 3) -> Tensor:
    """DPM-Solver++ from x (B, 2) at each row's own t (B,) to T_MIN on its own geometric grid. (B, 2)."""
    ratio = (T_MIN / t) ** (1 / steps)
    ladder = [update(coefficients(ratio, k + 1)) for k in range(order)]
    history: list[Tensor] = []
    for i in range(steps):
        k = min(order, i + 1, steps - i)
        now = t * ratio**i
        history = [net(x, now, now, None), *history][:3]
        m1, m2 = (history[j] if k > j else None for j in (1, 2))
        x = solver_step(x, history[0], m1, m2, ladder[k - 1], keep=False)[0]
    return x


def psi(net: Exact, x: Tensor, t: Tensor) -> Tensor:
    """The oracle Psi_{t->T_MIN} at the resolution of ORACLE_STEPS. Rows sorted by t, t (B,), cost least. (B, 2)."""
    parts = []
    for xs, ts in zip(x.split(CHUNK), t.split(CHUNK)):
        share = math.log(float(ts.max()) / T_MIN) / math.log(T_MAX / T_MIN)
        parts.append(solve(net, xs, ts, math.ceil(ORACLE_STEPS * share)))
    return torch.cat(parts)


def draw(samples: int, seed: int) -> Draws:
    """x_0 of the mixture, eps normal, ln t ~ N(-1.1, 2^2) clipped to [.01, 80], sorted by t. float64."""
    ids, random = torch.arange(samples), Random(seed, 0, 0)
    component = random.integers(rng.DATA, ids, MIXTURE.components)
    t = torch.exp(MEAN + STD * random.gauss(rng.TIME, ids).double()).clamp(T_LOW, T_MAX).sort().values
    x_0 = means(MIXTURE, torch.float64)[component] + MIXTURE.std * random.normal(rng.SAMPLE, ids, (2,)).double()
    x_t, eps = ProbabilityPath("ve").point(x_0, t, random.key(rng.NOISE), ids)
    return Draws(x_0, eps, x_t, t)


def cosines(x: Tensor, t: Tensor, sigma_data: float, count: int, seed: int, width: float = 1.0) -> Tensor:
    """`count` smooth functions cos(w . (c_in x, ln(t)/4) + b), w normal of this width, b uniform on the circle. (B, count)."""
    inputs = torch.cat((x / column(torch.sqrt(t**2 + sigma_data**2), x), t.log()[:, None] / 4), dim=1)
    ids, random = torch.arange(count), Random(seed, 1, 0)
    w, b = width * random.normal(rng.PROJECTION, ids, (3,)).double(), random.uniform(rng.SAMPLE, ids)
    return torch.cos(inputs @ w.T + 2 * math.pi * b)


def _solver(net: Exact, path: ProbabilityPath, samples: int, seed: int) -> dict[str, Any]:
    x = T_MAX * Random(seed, 0, 0).normal(rng.START, torch.arange(samples), (2,)).double()
    exact = psi(net, x, torch.full((samples,), T_MAX, dtype=x.dtype))
    rms: dict[str, list[float]] = {}
    for order in (1, 2, 3):
        ends = (rollout(net, path, table(path, "dpmpp", n, T_MAX, T_MIN, order), x, dense=False) for n in NFE)
        rms[str(order)] = [float((end - exact).square().sum(1).mean().sqrt()) for end in ends]
    fitted = [i for i, n in enumerate(NFE) if n >= ASYMPTOTIC]
    slopes = {o: -slope([NFE[i] for i in fitted], [v[i] for i in fitted]) for o, v in rms.items()}
    return {"nfe": list(NFE), "rms": rms, "slopes": slopes}


def _bias(net: Exact, path: ProbabilityPath, samples: int, seed: int, clock: float) -> dict[str, Any]:
    d = draw(samples, seed)
    target = psi(net, d.x_t, d.t)
    c_out = d.t * path.sigma_data / torch.sqrt(d.t**2 + path.sigma_data**2)
    jacobian = column(c_out, d.x_t) * cosines(d.x_t, d.t, path.sigma_data, FEATURES, seed) / math.sqrt(FEATURES)

    def figures(f: Tensor) -> tuple[float, float]:
        """E||e||^2 and B of a target f(x_r, r)."""
        e = f - target
        return float(e.square().sum(1).mean()), float((2 * jacobian.T @ e / samples).square().sum())

    rows: dict[str, Any] = {}

    def row(name: str, swept: str, values: tuple, target_of: Callable[[Any], Tensor], expected: str) -> None:
        x = [float(v) if swept == "eps" else 1 / v for v in values]
        mse, bias = map(list, zip(*(figures(target_of(v)) for v in values)))
        rows[name] = {
            "swept": swept,
            "x": x,
            "mse": mse,
            "bias": bias,
            "slope_mse": slope(x, mse),
            "slope_bias": slope(x, bias),
            "expected": expected,
        }
        _say(f"{name}, {time.perf_counter() - clock:.0f} s")

    hidden = "MSE 2; B 4, but 2 where the noise of E hides it, as here"
    row("CT, exact init", "1/q", CT_Q, lambda q: psi(net, *d.data_point(q)), hidden)
    row("CD-Euler, exact init", "1/q", EULER_Q, lambda q: psi(net, *d.stepped(net, q, "euler")), "MSE 4, B 4")
    row("CD-Heun, exact init", "1/q", HEUN_Q, lambda q: psi(net, *d.stepped(net, q, "heun")), "MSE 6 to 7, B 6 to 7")

    x_r, r = d.data_point(FINE_Q)
    for order in (1, 2, 3):
        row(
            f"CMT init, order {order}, q = {FINE_Q}",
            "1/N",
            CMT_N,
            lambda n, k=order: solve(net, x_r, r, n, k),
            f"MSE {2 * min(order, 2)}, B {2 * min(order, 2)}",
        )
    exact = psi(net, x_r, r)
    field = cosines(x_r, r, path.sigma_data, 2, seed + 1)
    unit = field / field.square().sum(1).mean().sqrt()
    row(f"Psi + sqrt(eps) g, q = {FINE_Q}", "eps", EPSILON, lambda e: exact + math.sqrt(e) * unit, "MSE 1, B 1")

    def denoised(q: float) -> Tensor:
        x, at = d.data_point(q)
        return net(x, at, at, None)

    row("diffusion init, D", "1/q", CT_Q, denoised, "no slope, a plateau")
    row("no init, zero", "1/q", CT_Q, lambda q: torch.zeros_like(target), "no slope, a plateau")
    return rows


def _say(text: str) -> None:
    print(f"theory: {text}", file=sys.stderr, flush=True)
