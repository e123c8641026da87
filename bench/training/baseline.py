"""A training step the way the published codes take it: what `python -m bench step` sets ours beside.

Written from what those codes do, not from their text: a plain DiT (adaLN in each block, attention by explicit matrices), fp32
without TF32 unless asked for otherwise; mid-training rolls its batch's few trajectories out anew every step, in float64 and one
tensor operation at a time, and repeats the endpoint for every point; MeanFlow takes torch.func.jvp of the whole batch and keeps
its graph; AdamW by foreach, clipping, EMA in a loop over parameters, and where the published code does so (consistency
models) NaN masked out of gradients and targets. Losses are those of `cmt_fast.objectives` on the same rows, which a test checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.config.schema import Ecd, Ect, Flow, MeanFlow, Stage, Trajectories
from cmt_fast.models.dit import DiT
from cmt_fast.objectives.consistency import earlier_time

NAN_MASKED = ("cmt_cm", "ect", "ecd")  # whose published code masks NaN; the others clip alone


class Embedder(nn.Module):
    """t: (B,) -> (B, width): cosines and sines, two layers."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features, self.hidden, self.out = features, nn.Linear(features, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        n, wide = self.features // 2, t.dtype if t.dtype == torch.float64 else torch.float32
        exponent = torch.linspace(math.log(0.25), math.log(32.0), n, dtype=torch.float64, device=t.device)
        angle = t.to(wide)[:, None] * exponent.exp().to(wide)
        with torch.autocast(t.device.type, enabled=False):
            return self.out(F.silu(self.hidden(torch.cat((angle.cos(), angle.sin()), dim=-1))))


class Block(nn.Module):
    """x: (B, T, D), c: (B, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate_a * self.attention(self.norm1(x) * (1 + scale_a) + shift_a)
        h = F.gelu(self.fc1(self.norm2(x) * (1 + scale_m) + shift_m), approximate="tanh")
        return x + gate_m * self.fc2(h)

    def attention(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v by its matrices: fused attention has no forward-mode derivative."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, width))


class PlainDiT(nn.Module):
    """The same function as a `DiT` of this project with its default options, whose weights it copies."""

    def __init__(self, ours: DiT) -> None:
        super().__init__()
        width, heads = ours.embed.out_features, ours.blocks[0].heads
        self.patch, self.cells, self.channels = ours.patch, ours.cells, ours.channels
        self.embed = nn.Linear(ours.embed.in_features, width)
        self.time = Embedder(ours.time.features, width)
        self.duration = Embedder(ours.time.features, width) if ours.duration is not None else None
        self.label = nn.ParameterDict({"table": torch.empty_like(ours.label.table)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in ours.blocks)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, ours.final.out_features)
        self.register_buffer("position", ours.position.clone(), persistent=False)
        self.to(ours.embed.weight.device, ours.embed.weight.dtype)
        self.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor) -> Tensor:
        b, n, p = len(x), self.cells, self.patch
        kernel = self.embed.weight.view(-1, self.channels, p, p)
        h = F.conv2d(x, kernel, self.embed.bias, stride=p).flatten(2).transpose(1, 2) + self.position
        c = self.time(t) + F.embedding(labels, self.label["table"])
        if self.duration is not None:
            c = c + self.duration(t - r)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        y = self.final(self.final_norm(h) * (1 + scale) + shift)
        return y.reshape(b, n, n, self.channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, n * p, n * p)


class PlainDenoiser(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, table 1) around it: D(x, t)."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.net, self.sigma_data = PlainDiT(ours.net), ours.sigma_data

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor) -> Tensor:
        wide = self.net.embed.weight.dtype
        x, t = x.to(wide), t.to(wide).reshape(-1, 1, 1, 1)
        s = self.sigma_data
        c_skip, c_out = s**2 / (t**2 + s**2), t * s / (t**2 + s**2).sqrt()
        c_in, c_noise = 1 / (s**2 + t**2).sqrt(), t.log() / 4
        return c_skip * x + c_out * self.net(c_in * x, c_noise.flatten(), None, labels).to(wide)


class PlainVelocity(nn.Module):
    """u(x, r, t) as it is."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.net = PlainDiT(ours.net)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor) -> Tensor:
        wide = self.net.embed.weight.dtype
        u = self.net(x.to(wide), t.to(wide), (t if r is None else r).to(wide), labels)
        return u.to(wide)


def plain(ours: nn.Module) -> nn.Module:
    """The plain twin of a Denoiser or an AverageVelocity over a DiT, with copies of its weights."""
    return PlainDenoiser(ours) if hasattr(ours, "sigma_data") else PlainVelocity(ours)


# ------------------------------------------------------------------------------------------------- losses, (B,) each


def _wide(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def flow_loss(net: Callable, x_0: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """||u(z_t, t) - (eps - x_0)||^2."""
    z = (1 - _wide(t)) * x_0 + _wide(t) * eps
    return ((net(z, t, t, labels) - (eps - x_0)) ** 2).flatten(1).sum(1)


def meanflow_loss(net: Callable, x_0: Tensor, labels: Tensor, t: Tensor, r: Tensor, eps: Tensor, c: MeanFlow) -> Tensor:
    """MeanFlow by one torch.func.jvp of every row, whose graph is kept though the target is detached."""
    z, v = (1 - _wide(t)) * x_0 + _wide(t) * eps, eps - x_0
    u, u_dot = torch.func.jvp(
        lambda z, t, r: net(z, t, r, labels), (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
    )
    target = (v - _wide(t - r) * u_dot).detach()
    squared = ((u - target) ** 2).flatten(1).sum(1)
    return squared / (squared.detach() + c.c) ** c.p


def _distance(squared: Tensor, name: str, c: float) -> Tensor:
    return torch.sqrt(squared + c**2) - c if name == "pseudo_huber" else torch.sqrt(squared)


def consistency_loss(
    net: Callable,
    x_0: Tensor,
    labels: Tensor,
    t: Tensor,
    r: Tensor,
    eps: Tensor,
    c: Ect | Ecd,
    teacher: Callable | None,
) -> Tensor:
    """ECT, or ECD with a Heun step of the teacher for x_r. As published rows with r = 0 take x_r itself."""
    x_t = x_0 + _wide(t) * eps
    with torch.no_grad():
        if teacher is None:
            x_r = x_0 + _wide(r) * eps
        else:
            late, safe = _wide(t), torch.where(r > 0, r, t)
            slope = (x_t - teacher(x_t, t, None, labels)) / late
            x_e = x_t + _wide(r - t) * slope
            again = (x_e - teacher(x_e, safe, None, labels)) / _wide(safe)
            x_r = torch.where(_wide(r) > 0, x_t + _wide(r - t) * (slope + again) / 2, x_e)
        target = torch.nan_to_num(net(x_r, torch.where(r > 0, r, t), None, labels))
        target = torch.where(_wide(r) > 0, target, x_r)
    squared = ((net(x_t, t, None, labels) - target) ** 2).flatten(1).sum(1)
    weight = 1 / (t - r) if c.weight == "inverse_step" else 1 / t**2 + 1 / net.sigma_data**2
    return _distance(squared, c.distance, c.c) * weight


def cmt_cm_loss(net: Callable, states: Tensor, times: Tensor, labels: Tensor, distance: str, c: float) -> Tensor:
    """Every node of a batch of trajectories (N + 1, n, ...) but the last, step-major, onto the endpoint, tiled."""
    steps, n = len(states) - 1, states.shape[1]
    x, target = states[:-1].flatten(0, 1), states[-1].repeat(steps, 1, 1, 1)
    f = net(x, times[:-1].repeat_interleave(n), None, labels.repeat(steps))
    return _distance(((f - torch.nan_to_num(target)) ** 2).flatten(1).sum(1), distance, c)


def cmt_mf_loss(net: Callable, states: Tensor, times: Tensor, labels: Tensor, pick: Tensor) -> Tensor:
    """Pairs i < j of nodes: all of them are put together, and `pick` (B,) says which are kept."""
    i, j = torch.triu_indices(len(states), len(states), offset=1, device=states.device)
    n = states.shape[1]
    x, x_r = (torch.cat([states[k] for k in nodes.tolist()])[pick] for nodes in (i, j))
    t, r = (times[nodes].repeat_interleave(n)[pick] for nodes in (i, j))
    u = net(x, t, r, labels.repeat(len(i))[pick])
    return ((u - (x - x_r) / _wide(t - r)) ** 2).flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------- rollouts


@torch.no_grad()
def dpm_solver(net: Callable, x: Tensor, labels: Tensor, c: Trajectories) -> tuple[Tensor, Tensor]:
    """DPM-Solver++, multistep, in data prediction on VE, in float64, an operation at a time: nodes (N + 1, n, ...), times."""
    ends = torch.tensor([c.t_max, c.t_min], dtype=torch.float64, device=x.device).log().neg()
    grid = torch.linspace(float(ends[0]), float(ends[1]), c.nfe + 1, dtype=torch.float64, device=x.device)
    times, x = torch.exp(-grid), x.double()
    states, found = [x], []
    for i in range(c.nfe):
        order = min(c.order, i + 1, c.nfe - i)
        found.append(net(x, times[i].expand(len(x)), None, labels).double())
        h, ratio = grid[i + 1] - grid[i], times[i + 1] / times[i]
        phi_1 = torch.expm1(-h)
        step = phi_1 * found[-1]
        if order > 1:
            r_0 = (grid[i] - grid[i - 1]) / h
            first = (found[-1] - found[-2]) / r_0
            if order == 2:
                step = step + 0.5 * phi_1 * first
            else:
                r_1 = (grid[i - 1] - grid[i - 2]) / h
                earlier = (found[-2] - found[-3]) / r_1
                slope = first + (r_0 / (r_0 + r_1)) * (first - earlier)
                bend = (first - earlier) / (r_0 + r_1)
                phi_2 = phi_1 / h + 1.0
                step = step - phi_2 * slope + (phi_2 / h - 0.5) * bend
        x = ratio * x - step
        states.append(torch.nan_to_num(x))
    return torch.stack(states), times


@torch.no_grad()
def heun_solver(net: Callable, x: Tensor, labels: Tensor, c: Trajectories) -> tuple[Tensor, Tensor]:
    """Heun on linear flow, in float64: nodes (N + 1, n, ...), times."""
    times = torch.linspace(c.t_max, c.t_min, c.nfe // 2 + 1, dtype=torch.float64, device=x.device)
    states, x = [x.double()], x.double()
    for t, s in zip(times, times[1:]):
        slope = net(x, t.expand(len(x)), None, labels).double()
        y = x + (s - t) * slope
        x = x + (s - t) * 0.5 * (slope + net(y, s.expand(len(x)), None, labels).double())
        states.append(x)
    return torch.stack(states), times


# ------------------------------------------------------------------------------------------------- the step


class Rows(NamedTuple):
    """Data in memory. x: (N, ...), labels: (N,), classes."""

    x: Tensor
    labels: Tensor
    classes: int


class Step:
    """One training step of one stage: rows, loss, backward, AdamW, EMA. precision: "fp32", "tf32" or "bf16" (autocast)."""

    def __init__(self, stage: Stage, net: nn.Module, teacher: nn.Module, data: Rows, precision: str = "fp32") -> None:
        """net, teacher: plain networks; their weights are their own."""
        self.stage, self.net, self.teacher, self.data, self.precision = stage, net, teacher, data, precision
        self.ema = {k: p.detach().clone() for k, p in net.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            net.parameters(), stage.lr, stage.betas, stage.eps, stage.weight_decay, foreach=True
        )
        self.kind, self.beta = stage.objective.kind, 0.999

    def __call__(self) -> None:
        """One step."""
        device = self.data.x.device.type
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss().mean()
        loss.backward()
        self.update()

    def loss(self) -> Tensor:
        """Of freshly drawn rows, (B,)."""
        o, rows = self.stage.objective, self.stage.batch
        if self.kind in ("cmt_cm", "cmt_mf"):
            return self._mid(o, rows)
        x_0, labels = self._batch(rows)
        eps = torch.randn_like(x_0)
        normal = lambda: torch.randn(rows, device=x_0.device)
        if isinstance(o, Flow):
            return flow_loss(self.net, x_0, labels, torch.sigmoid(o.mean + o.std * normal()), eps)
        if isinstance(o, MeanFlow):
            a, b = (torch.sigmoid(o.mean + o.std * normal()) for _ in range(2))
            t, r = torch.maximum(a, b), torch.minimum(a, b)
            r = torch.where(torch.rand(rows, device=x_0.device) < 1 - o.ratio, t, r)
            return meanflow_loss(self.net, x_0, labels, t, r, eps, o)
        t = torch.exp(o.mean + o.std * normal())
        teacher = self.teacher if isinstance(o, Ecd) else None
        return consistency_loss(self.net, x_0, labels, t, earlier_time(t, o.q, o.k, o.b), eps, o, teacher)

    def _batch(self, rows: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.data.x), (rows,), device=self.data.x.device)
        return self.data.x[index], self.data.labels[index]

    def _mid(self, o, rows: int) -> Tensor:
        """The batch's own trajectories, B // nfe of them, each of as many rows as it cost network calls."""
        c, x = self.stage.trajectories, self.data.x
        assert c is not None
        n = rows // c.nfe
        noise = c.t_max * torch.randn(n, *x.shape[1:], device=x.device)
        labels = torch.randint(self.data.classes, (n,), device=x.device)
        states, times = (dpm_solver if c.solver == "dpmpp" else heun_solver)(self.teacher, noise, labels, c)
        states, times = states.float(), times.float()
        if self.kind == "cmt_cm":
            return cmt_cm_loss(self.net, states, times, labels, o.distance, o.c)
        pairs = len(states) * (len(states) - 1) // 2
        return cmt_mf_loss(self.net, states, times, labels, torch.randint(n * pairs, (rows,), device=x.device))

    @torch.no_grad()
    def update(self) -> None:
        """NaN masked where it is published so, clip, AdamW, EMA, parameter by parameter."""
        if self.kind in NAN_MASKED:
            for p in self.net.parameters():
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.stage.grad_clip_norm)
        self.optimizer.step()
        for name, p in self.net.named_parameters():
            self.ema[name].copy_(p.detach().lerp(self.ema[name], self.beta))
