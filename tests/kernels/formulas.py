"""Every op again, by hand: the textbook formula on plain tensors, term by term, and its derivative by `torch.func.jvp`.

Independent of the reference backend: no fused torch function, no tangent rule, Philox in Python integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from cmt_kernels.cases import outputs, without_tangents
from cmt_kernels.dual import Dual
from cmt_kernels.philox import Key
from torch import Tensor


def attention(qkv: Tensor) -> Tensor:
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    p = torch.exp(s - s.detach().amax(-1, keepdim=True))
    return (p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("...d,ed->...e", x, weight)
    return y if bias is None else y + bias


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    x = x if bias is None else x + bias
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def label_embedding(labels: Tensor, table: Tensor, drop: Tensor | None) -> Tensor:
    dropped = [False] * len(labels) if drop is None else drop.tolist()
    return torch.stack([table[-1] if gone else table[label] for label, gone in zip(labels.tolist(), dropped)])


def time_embedding(t: Tensor, dim: int, max_frequency: float) -> Tensor:
    n = dim // 2
    omega = [0.25 * (max_frequency / 0.25) ** (i / (n - 1)) for i in range(n)]
    return torch.stack([torch.cos(w * t) for w in omega] + [torch.sin(w * t) for w in omega], dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    xh = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return xh * (1 + scale[:, None]) + shift[:, None]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    return x + gate[:, None] * (branch if bias is None else branch + bias)


def qk_norm(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    q, k, v = qkv.unbind(2)

    def turn(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
        if cos is None:
            return x
        pairs = torch.stack(x.tensor_split(2, dim=-1), dim=-1)  # (B, T, H, d/2, 2)
        turned = torch.einsum("bthdj,ijtd->bthdi", pairs, torch.stack((cos, -sin, sin, cos)).unflatten(0, (2, 2)))
        return torch.cat(turned.unbind(-1), dim=-1)

    return torch.stack((turn(q, q_weight), turn(k, k_weight), v), dim=2)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, size = weight.shape[-1], x.shape[-2:]
    wide = x.new_zeros(*x.shape[:2], size[0] + n - 1, size[1] + n - 1)
    wide[..., n // 2 : n // 2 + size[0], n // 2 : n // 2 + size[1]] = x
    y = sum(
        torch.einsum("bchw,ec->behw", wide[..., i : i + size[0], j : j + size[1]], weight[..., i, j])
        for i in range(n)
        for j in range(n)
    )
    return y if bias is None else y + bias[:, None, None]


def pixel_norm(x: Tensor, dim: int, eps: float = 1e-4) -> Tensor:
    return x / (eps + torch.sqrt((x * x).mean(dim, keepdim=True)))


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    parts = []
    for part in x.tensor_split(groups, dim=1):
        centred = part - part.mean((1, 2, 3), keepdim=True)
        parts.append(centred / torch.sqrt((centred * centred).mean((1, 2, 3), keepdim=True) + eps))
    return torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]


def clip(x: Tensor, limit: float) -> Tensor:
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def dropout(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    def kept(e: int, a: int, b: int) -> bool:
        h = e ^ a
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32 ^ b
        h = (h ^ h >> 16) * 0x045D9F3B % 2**32
        return h ^ h >> 16 >= p * 2**32

    mask = torch.tensor([[kept(e, a, b) for e in range(x[0].numel())] for a, b in seeds.tolist()])
    return x * mask.view(x.shape) / (1 - p)


def fourier_embedding(t: Tensor, frequency: Tensor, phase: Tensor | None) -> Tensor:
    if phase is None:
        return torch.stack([torch.cos(w * t) for w in frequency] + [torch.sin(w * t) for w in frequency], dim=-1)
    return torch.stack([math.sqrt(2) * torch.cos(w * t + a) for w, a in zip(frequency, phase)], dim=-1)


def modulated_rms_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + scale[:, None]) + shift[:, None]


def mp_silu(x: Tensor, scale: Tensor | None) -> Tensor:
    s = x if scale is None else x * (1 + scale).reshape(*scale.shape, *[1] * (x.ndim - 2))
    return s / (1 + torch.exp(-s)) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float, limit: float | None) -> Tensor:
    s = ((1 - share) * a + share * b) / math.sqrt((1 - share) ** 2 + share**2)
    return s if limit is None else clip(s, limit)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    whole = a.shape[1] + b.shape[1]
    parts = [x / math.sqrt(x.shape[1]) * math.sqrt(whole / 2) for x in (a, b)]
    return torch.cat([x[:, i : i + 1] for x in parts for i in range(x.shape[1])], dim=1)


def unit_weight(weight: Tensor, gain: float, channels_last: bool, eps: float = 1e-4) -> Tensor:
    rows = [row / (eps + torch.sqrt((row * row).sum() / row.numel())) for row in weight]
    return gain * torch.stack(rows)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        w0, w1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ w0, b % 2**32, (a >> 32) ^ c3 ^ w1, a % 2**32
    return c0, c1, c2, c3


def random_bits(key: tuple[int, ...], sample: Tensor, blocks: int) -> Tensor:
    seed, stage, step, stream = (field % 2**32 for field in key)
    return torch.tensor(
        [[philox((b, s % 2**32, step, stream), (seed, stage)) for b in range(blocks)] for s in sample.tolist()]
    )


def normal(key: Key, sample: list[int], n: int, dtype: torch.dtype) -> Tensor:
    """(B, n) by Box-Muller over the Philox blocks of each sample."""
    low = [field % 2**32 for field in key]
    seed, stage, step, stream = low
    bits = [[philox((block, s % 2**32, step, stream), (seed, stage)) for block in range(-(-n // 4))] for s in sample]
    u = (torch.tensor(bits, dtype=torch.float64) + 0.5) * 2.0**-32
    turn = torch.tensor(bits, dtype=torch.float64)[..., 1::2] * 2.0**-32
    radius, angle = torch.sqrt(-2 * torch.log(u[..., ::2].to(dtype))), 2 * math.pi * turn.to(dtype)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :n]


def path_point(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, alpha_dot: Tensor, sigma_dot: Tensor, key: Key, sample: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    eps = normal(key, sample.tolist(), math.prod(x_0.shape[1:]), dtype).view(x_0.shape).to(x_0)
    x, noise = x_0.flatten(1), eps.flatten(1)
    x_t, v = alpha[:, None] * x + sigma[:, None] * noise, alpha_dot[:, None] * x + sigma_dot[:, None] * noise
    return x_t.view(x_0.shape), v.view(x_0.shape)


def solver_step(
    x: Tensor, f: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor, keep: bool
) -> tuple[Tensor, ...]:
    c_skip, c_out, w, c0, c1, c2, c3, c_in = coefficients.expand(len(x), 8).T.unflatten(1, (-1, *[1] * (x.ndim - 1)))
    if len(f) > len(x):
        f = (1 - w) * f[len(x) :] + w * f[: len(x)]
    m0 = c_skip * x + c_out * f
    y = c0 * x + c1 * m0 + (0 if m1 is None else c2 * m1) + (0 if m2 is None else c3 * m2)
    return (y, m0, c_in * y) if keep else (y,)


def consistency_loss(prediction: Tensor, target: Tensor, distance: str, c: float) -> Tensor:
    l = ((prediction - target.detach()) ** 2).flatten(1).sum(1)
    return {"squared_l2": l, "l2": torch.sqrt(l + 1e-16), "pseudo_huber": torch.sqrt(l + c**2) - c}[distance]


def meanflow_loss(u: Tensor | Dual, v: Tensor, t: Tensor, r: Tensor, p: float, c: float) -> tuple[Tensor, Tensor]:
    u, u_dot = u if isinstance(u, Dual) else (u, u[:0])
    losses, errors = [], []
    for i in range(len(u)):
        target = v[i] - (t[i] - r[i]) * u_dot[i] if i < len(u_dot) else v[i]
        l = ((u[i] - target.detach()) ** 2).sum()
        losses.append(l / (l.detach() + c) ** p)
        errors.append(l.detach())
    return torch.stack(losses), torch.stack(errors)


def adamw_ema(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    emas: list[Tensor],
    ema_betas: list[float],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    half: Tensor | None = None,
) -> Tensor:
    norm = torch.sqrt((g * g).sum())
    g = g * min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else g
    m.copy_(betas[0] * m + (1 - betas[0]) * g)
    v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    p.copy_(p - lr * weight_decay * p - lr * m_hat / (torch.sqrt(v_hat) + eps))
    for e, beta in zip(emas, ema_betas):
        e.copy_(e + (1 - beta) * (p - e))
    if half is not None:
        half.copy_(p)
    return norm


def weight_gradient(g: Tensor, dy: Tensor, x: Tensor) -> None:
    g.copy_(g + torch.einsum("...e,...d->ed", dy, x))


def by_hand(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    """What `outputs` gives, from the formula: values with their graph, then the tangent (k, ...) of a dual call."""
    formula = globals()[op]
    duals = {name: x for name, x in inputs.items() if isinstance(x, Dual)}
    if not duals or op == "meanflow_loss":
        return outputs(op, formula, inputs)
    k = len(next(iter(duals.values())).tangent)
    plain = without_tangents(inputs)
    return outputs(op, formula, plain) + [tangent_of(lambda **kw: formula(**plain | kw), duals)[:k]]


def tangent_of(function: Any, duals: dict[str, Dual]) -> Tensor:
    """Derivative of function(**values) along the tangents by forward AD: (B, ...), zero after the first k rows."""
    names = tuple(duals)
    primals = tuple(d.value.detach() for d in duals.values())
    directions = tuple(torch.cat((d.tangent, torch.zeros_like(d.value[len(d.tangent) :]))) for d in duals.values())
    return torch.func.jvp(lambda *xs: function(**dict(zip(names, xs))), primals, directions)[1].detach()
