"""ODE solvers of the teacher as one table of coefficients and one step function; guidance; the few-step samplers.

A row of a table says where the network is called and which linear combination of the state and the
newest predictions follows: x <- c0 x + c1 m0 + c2 m1 + c3 m2 (`cmt_kernels.solver_step`). Tables are
in data prediction on VE and for DPM-Solver++, in velocity for Euler, Heun and MeanFlow jumps on linear flow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from cmt_kernels import solver_step
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath


class Row(NamedTuple):
    """One network call: at time t (target time r for a jump), the update after it, and whether a node is reached."""

    t: float
    r: float
    coefficients: tuple[float, float, float, float]
    node: bool


class Table(NamedTuple):
    """A solver on a grid. times: the nodes' own times, from noise to data; prediction: "data" or "velocity"."""

    times: tuple[float, ...]
    rows: tuple[Row, ...]
    prediction: str

    @property
    def nfe(self) -> int:
        return len(self.rows)


def grid(path: ProbabilityPath, steps: int, t_max: float, t_min: float, shift: float = 1.0) -> tuple[float, ...]:
    """steps + 1 times from t_max to t_min: uniform in log SNR (geometric) on VE, uniform on linear flow, then shifted.

    The shift t' = s t / (1 + (s - 1) t) moves linear-flow times towards noise; labels are the shifted times.
    """
    if path.name == "ve":
        ratio = (t_min / t_max) ** (1 / steps)
        return tuple(t_max * ratio**i for i in range(steps)) + (t_min,)
    times = [t_max + (t_min - t_max) * i / steps for i in range(steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


def dpmpp_coefficients(
    path: ProbabilityPath, t: float, s: float, order: int, r0: float = 1.0, r1: float = 1.0
) -> tuple:
    """DPM-Solver++ multistep update t -> s in data prediction (Lu et al. 2022); h: step of lambda = log(alpha/sigma).

    r0, r1: earlier steps over h. x <- (sigma_s/sigma_t) x - alpha_s (p1 D0 + p2 D1 + p3 D2) with
    divided differences of the denoised predictions; p1 = e^-h - 1, p2 = p1/h + 1, p3 = p2/h - 1/2.
    """
    (a_t, s_t), (a_s, s_s) = (_alpha_sigma(path, u) for u in (t, s))
    ratio = s_s / s_t
    h = _log_snr(path, s) - _log_snr(path, t)
    p1 = math.expm1(-h)
    if order == 1:
        return ratio, -a_s * p1, 0.0, 0.0
    if order == 2:
        return ratio, -a_s * p1 * (1 + 0.5 / r0), a_s * p1 * 0.5 / r0, 0.0
    p2 = p1 / h + 1
    p3 = p2 / h - 0.5
    first = (1 / r0, -1 / r0, 0.0)  # (m0 - m1)/r0, (m1 - m2)/r1: first differences
    second = (0.0, 1 / r1, -1 / r1)
    d1 = [a + r0 / (r0 + r1) * (a - b) for a, b in zip(first, second)]
    d2 = [(a - b) / (r0 + r1) for a, b in zip(first, second)]
    c = [-p1 * (i == 0) + p2 * d1[i] - p3 * d2[i] for i in range(3)]
    return ratio, a_s * c[0], a_s * c[1], a_s * c[2]


def _alpha_sigma(path: ProbabilityPath, t: float) -> tuple[float, float]:
    alpha, sigma, _, _ = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(alpha), float(sigma)


def _log_snr(path: ProbabilityPath, t: float) -> float:
    """lambda = log(alpha / sigma): -inf at pure noise, +inf at data."""
    alpha, sigma = _alpha_sigma(path, t)
    return -math.inf if alpha <= 0 else math.inf if sigma <= 0 else math.log(alpha / sigma)


def ve_euler(ratio):
    """Euler on VE in data prediction, ratio = s/t: x <- ratio x + (1 - ratio) D. Works on floats and tensors."""
    return ratio, 1 - ratio


def ve_heun(ratio):
    """Heun's corrector on VE from the Euler state, ratio = s/t > 0: x <- x + (1 - ratio)/(2 ratio) (D1 - D0)."""
    c = (1 - ratio) / (2 * ratio)
    return c, -c


def table(
    path: ProbabilityPath, solver: str, nfe: int, t_max: float, t_min: float, order: int = 3, shift: float = 1.0
) -> Table:
    """The solver's rows for `nfe` network calls. DPM-Solver++ climbs and ends by the ladder 1, 2, .., order, .., 2, 1.

    Raises ValueError for an odd nfe of Heun, times that are not the path's and a solver that the path does not have.
    """
    if not 0 <= t_min < t_max:
        raise ConfigError(f"{t_min} is not in [0, t_max), t_max is {t_max}", "t_min")
    if path.name == "ve" and t_min == 0:
        raise ConfigError("must be above 0 on the path 've', whose grid is geometric", "t_min")
    if path.name == "linear" and t_max > 1:
        raise ConfigError(f"{t_max} is past 1, where the path 'linear' starts from noise", "t_max")
    if path.name == "ve" and shift != 1:
        raise ConfigError(f"{shift:g} is of the path 'linear'; on 've' times are spaced by noise, take 1", "shift")
    if solver == "heun" and nfe % 2:
        raise ConfigError(f"heun calls the network twice a step, nfe {nfe} must be even", "nfe")
    steps = nfe // 2 if solver == "heun" else nfe
    times = grid(path, steps, t_max, t_min, shift)
    lam = [_log_snr(path, u) for u in times] if solver == "dpmpp" else []
    rows: list[Row] = []
    for i, (t, s) in enumerate(zip(times, times[1:])):
        if solver == "dpmpp":
            k = min(order, i + 1, steps - i)
            h = lam[i + 1] - lam[i]
            if k > 1 and not math.isfinite(lam[i - k + 1]):
                k -= 1  # the first interval from pure noise on linear flow has infinite length in lambda
            r0 = (lam[i] - lam[i - 1]) / h if k > 1 else 1.0
            r1 = (lam[i - 1] - lam[i - 2]) / h if k > 2 else 1.0
            rows.append(Row(t, t, dpmpp_coefficients(path, t, s, k, r0, r1), True))
        elif path.name == "ve" and solver in ("euler", "heun"):
            rows.append(Row(t, t, (*ve_euler(s / t), 0.0, 0.0), solver == "euler"))
            if solver == "heun":
                rows.append(Row(s, s, (1.0, *ve_heun(s / t), 0.0), True))
        elif path.name == "linear" and solver in ("euler", "heun", "jump"):
            rows.append(Row(t, s if solver == "jump" else t, (1.0, s - t, 0.0, 0.0), solver != "heun"))
            if solver == "heun":
                rows.append(Row(s, s, (1.0, (s - t) / 2, -(s - t) / 2, 0.0), True))
        else:
            raise ConfigError(f"solver {solver!r} does not exist on the path {path.name!r}", "solver")
    prediction = "data" if path.name == "ve" or solver == "dpmpp" else "velocity"
    return Table(times, tuple(rows), prediction)


def _coefficients(plan: Table, path: ProbabilityPath, scale: float, scalings: Callable | None) -> Tensor:
    """(nfe, 8) float64: what `cmt_kernels.solver_step` multiplies by after each network call.

    A data-prediction table on linear flow reads D = x - t v off the network's velocity v = c_skip x + c_out F.
    """
    t = torch.tensor([row.t for row in plan.rows], dtype=torch.float64)
    c_skip, c_out, c_in = scalings(t) if scalings else (torch.zeros_like(t), *[torch.ones_like(t)] * 2)
    if plan.prediction == "data" and path.name == "linear":
        c_skip, c_out = 1 - t * c_skip, -t * c_out
    multistep = torch.tensor([row.coefficients for row in plan.rows], dtype=torch.float64)
    columns = (c_skip, c_out, torch.full_like(t, scale), *multistep.unbind(-1), c_in.roll(-1))
    return torch.stack(columns, dim=-1)


@functools.lru_cache(maxsize=64)
def _on(device: torch.device, rows: tuple[tuple[float, ...], ...]) -> tuple[Tensor, ...]:
    """These rows on a device, copied once: a step copies nothing, and a rollout that has run can be captured in a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64, device=device).unbind()


@torch.no_grad()
def rollout(
    net: Net,
    path: ProbabilityPath,
    plan: Table,
    x: Tensor,
    labels: Tensor | None = None,
    dense: bool = True,
    nodes: Tensor | None = None,
    guide: Tensor | None = None,
) -> Tensor:
    """Integrate from x (B, ...) at plan.times[0]. Returns all nodes (N + 1, B, ...), or the last (B, ...) if not dense.

    nodes: (N + 1, B, ...) to write them into, such as a part of a pool; x may be its first. guide: (B, 3), of each row the scale
    of a guided network, in the place of its own, and the interval of times [low, high] outside of which it is 1.
    A network that knows its own preconditioning (`raw`, `scalings`) is called on its scaled input, and guidance,
    preconditioning, update, the write into the trajectory and the next scaled input are one `solver_step`.
    """
    raw, scalings, scale = getattr(net, "raw", net), getattr(net, "scalings", None), getattr(net, "scale", 1.0)
    table = _coefficients(plan, path, scale, scalings)
    if nodes is None:
        nodes = x.new_empty((len(plan.times) if dense else 0, *x.shape))
    reached, history, x_in = 0, [], float(table[-1, -1]) * x  # c_in of the first call stands in the last row
    if dense and nodes[0].data_ptr() != x.data_ptr():
        nodes[0] = x
    on_device = _on(x.device, tuple(map(tuple, table.tolist())))
    for i, (row, coefficients) in enumerate(zip(plan.rows, on_device)):
        t, r = (torch.full((x.shape[0],), u, dtype=x.dtype, device=x.device) for u in (row.t, row.r))
        f = raw(x_in, t, r, labels)
        if guide is not None:
            coefficients = _by_row(coefficients, guide, row.t)
        m1, m2 = (history[j] if len(history) > j and row.coefficients[j + 2] else None for j in (0, 1))
        reached += row.node
        slot = nodes[reached] if row.node and dense else None
        x, m0, x_in = solver_step(x, f, m1, m2, coefficients, i + 1 < plan.nfe, slot)
        history = [m0, *history][:2]
    return nodes if dense else x


def _by_row(coefficients: Tensor, guide: Tensor, t: float) -> Tensor:
    """(8,) of a call at t -> (B, 8), each row with the scale of its own guide (B, 3)."""
    omega, low, high = guide.to(coefficients.dtype).unbind(1)
    here = torch.where((low <= t) & (t <= high), omega, 1.0)
    rows = coefficients.expand(len(guide), -1)
    return torch.cat((rows[:, :2], here[:, None], rows[:, 3:]), dim=1)


def update(coefficients: Tensor) -> Tensor:
    """(..., 4) of an update -> (..., 8) of a `solver_step` whose f is the prediction itself."""
    zero, one = torch.zeros_like(coefficients[..., :1]), torch.ones_like(coefficients[..., :1])
    return torch.cat((zero, one, one, coefficients, one), dim=-1)


@torch.no_grad()
def ve_step(net: Net, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None, method: str) -> Tensor:
    """One Euler or Heun step of the VE ODE from t to r, each row its own: x (B, ...), t, r (B,) -> x_r (B, ...).

    Rows with r = 0 take the Euler step, which there is the denoised image: Heun's second slope divides by r.
    """
    ratio = r / t
    zero = torch.zeros_like(ratio)
    d0 = net(x, t, t, labels)
    y = solver_step(x, d0, None, None, update(torch.stack((*ve_euler(ratio), zero, zero), dim=-1)), keep=False)[0]
    if method == "euler":
        return y
    positive = ratio > 0
    c = [torch.where(positive, w, zero) for w in ve_heun(ratio.masked_fill(~positive, 1.0))]
    d1 = net(y, torch.where(positive, r, t), torch.where(positive, r, t), labels)
    coefficients = update(torch.stack((torch.ones_like(zero), *c, zero), dim=-1))
    return solver_step(y, d1, d0, None, coefficients, keep=False)[0]
