"""The networks and steps that benches time: a DiT whose gates are perturbed, seeded batches, one step of an objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cmt_kernels import use
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast.config.schema import Flow, MeanFlow
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.models.dit import DiT
from cmt_fast.models.precond import AverageVelocity
from cmt_fast.objectives import Batch, LossContext
from cmt_fast.objectives.flow import flow
from cmt_fast.objectives.meanflow import draw_times, meanflow, tangent_rows

CHANNELS, PATCH, CLASSES = 4, 2, 10
MEANFLOW = MeanFlow()  # a quarter of the rows has r != t
WORLD = LossContext(ProbabilityPath("linear"), rng.Random(0, 2, 5))


def perturb(net: nn.Module, std: float = 0.02) -> nn.Module:
    """Move all parameters away from their start: with adaLN-zero's closed gates every tangent is zero."""
    device = next(net.parameters()).device
    g = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_((std * torch.randn(p.shape, generator=g, device=device)).to(p))
    return net


def average_velocity(width: int, depth: int, tokens: int, heads: int | None = None, **more: Any) -> nn.Module:
    """u(x, t, r) by a DiT on latents of 4 channels in patches of 2 x 2; heads of 64 unless given. On the CPU, fp32."""
    cells = math.isqrt(tokens)
    if cells**2 != tokens:
        raise ValueError(f"--tokens: {tokens} is not a square number")
    torch.manual_seed(0)
    options = {"width": width, "depth": depth, "heads": heads or max(1, width // 64), "two_times": True} | more
    return AverageVelocity(perturb(DiT(CHANNELS, PATCH * cells, CLASSES, patch=PATCH, **options)))


def batch_of(rows: int, tokens: int, device: str) -> Batch:
    """Seeded rows with labels, one in ten dropped."""
    g = torch.Generator().manual_seed(2)
    side = PATCH * math.isqrt(tokens)
    x = torch.randn(rows, CHANNELS, side, side, generator=g)
    labels = torch.arange(rows) % CLASSES
    return Batch(*(y.to(device) for y in (x, labels, torch.arange(rows), torch.arange(rows) % 10 == 9)))


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """What forward-mode AD of torch needs: composite ops and math attention."""
    with use("reference"), sdpa_kernel(SDPBackend.MATH):
        yield


def func_jvp(net: Callable, z: Tensor, t: Tensor, r: Tensor, v: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """u and du/dt of all rows by torch.func.jvp. (B, ...), (B, ...)."""
    with plain_torch():
        return torch.func.jvp(
            lambda z, t, r: net(z, t, r, batch.labels, batch.drop),
            (z, t, r),
            (v, torch.ones_like(t), torch.zeros_like(r)),
        )


def flow_loss(net: Callable, batch: Batch) -> Tensor:
    """Flow matching, as the trainer computes it."""
    return flow(net, batch, Flow(), WORLD)[0].mean()


def meanflow_loss(net: Callable, batch: Batch, config: MeanFlow = MEANFLOW) -> Tensor:
    """MeanFlow, as the trainer computes it."""
    return meanflow(net, batch, config, WORLD)[0].mean()


def one_pass_loss(net: Callable, batch: Batch, config: MeanFlow = MEANFLOW) -> Tensor:
    """The same loss as published implementations compute it: func.jvp of the whole batch with the graph kept."""
    t, r = draw_times(batch.sample, tangent_rows(len(batch.x_0), config.ratio), config, WORLD, batch.x_0.dtype)
    z, v = WORLD.path.point(batch.x_0, t, WORLD.random.key(rng.NOISE), batch.sample)
    u, u_dot = func_jvp(net, z, t, r, v, batch)
    target = (v - (t - r).view(-1, 1, 1, 1) * u_dot).detach()
    squared = (u - target).square().flatten(1).sum(1)
    return (squared / (squared.detach() + config.c) ** config.p).mean()


def saved_bytes(call: Callable[[], Any], keep: nn.Module) -> int:
    """Bytes that autograd keeps for backward of `call`, each storage once; parameters and buffers of `keep` are not counted."""
    own = {p.untyped_storage().data_ptr() for p in (*keep.parameters(), *keep.buffers())}
    storages: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        if x._is_zerotensor():  # forward-mode AD's zeros have no storage
            return x
        s = x.untyped_storage()
        if s.data_ptr() not in own:
            storages[s.data_ptr()] = s  # kept alive, so that no address comes twice
        return (
            x.detach()
        )  # an op's output holds the op's node, which holds what is packed: a circle that nothing would free

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    total = sum(s.nbytes() for s in storages.values())
    del result
    return total
