"""The networks as Duals: value, tangent, gradients and memory against the one-pass func.jvp."""

from __future__ import annotations

import pytest
import torch
from cmt_kernels import Dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast.config.schema import MeanFlow
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.models.dit import SIZES, DiT
from cmt_fast.models.mlp import Mlp
from cmt_fast.models.precond import AverageVelocity, Denoiser, NoiseDenoiser
from cmt_fast.objectives import Batch, LossContext
from cmt_fast.objectives.meanflow import draw_times, meanflow

B = 8


def perturbed(net: torch.nn.Module) -> torch.nn.Module:
    """Fresh adaLN-zero gates make every tangent zero: move all parameters away from their start."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return net


def dit(**more) -> DiT:
    options = {"width": 32, "depth": 2, "heads": 4, "patch": 2, "two_times": True} | more
    return perturbed(DiT(2, 8, 5, **options)).double()


def arguments(k: int | None = None):
    g = torch.Generator().manual_seed(2)
    x, v = (torch.randn(B, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t, r = torch.rand(B, generator=g, dtype=torch.float64), torch.rand(B, generator=g, dtype=torch.float64)
    labels, drop = torch.arange(B) % 5, torch.arange(B) % 3 == 0
    if k is None:
        return x, t, r, labels, drop
    return Dual(x, v[:k]), Dual(t, torch.ones(k).double()), Dual(r, torch.zeros(k).double()), labels, drop


NETS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "both": {"qk_norm": True, "rope": True},
    "patch 4": {"patch": 4},
    "published": {"embeddings": "dit"},
    "lightning": {"embeddings": "dit", "mlp": "swiglu", "norm": "rms", "rope": True},
    "wide head": {"wide_head": (32, 1, 2)},
    "DiT-DH": {"embeddings": "gaussian", "mlp": "swiglu", "norm": "rms", "rope": True, "wide_head": (40, 2, 5)},
}


@pytest.mark.parametrize("k", [0, 1, B // 4, B])
@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_whole_dit_against_func_jvp(options, k):
    net = dit(**options)
    x, t, r, labels, drop = arguments()
    dual = arguments(k)
    out = net(*dual)
    assert torch.equal(out.value, net(x, t, r, labels, drop))
    assert out.tangent.shape == (k, 2, 8, 8) and not out.tangent.requires_grad
    if k == 0:
        return
    with sdpa_kernel(SDPBackend.MATH):
        _, want = torch.func.jvp(
            lambda *a: net(*a, labels[:k], drop[:k]), (x[:k], t[:k], r[:k]), tuple(d.tangent for d in dual[:3])
        )
    assert want.abs().max() > 1e-2
    assert torch.allclose(out.tangent, want, rtol=0, atol=1e-10 * want.abs().max().item())


@pytest.mark.parametrize("options", [NETS["both"], NETS["DiT-DH"]], ids=["both", "DiT-DH"])
def test_blocks_that_run_again_give_the_same_gradients(options):
    """In float32, whose ops are native where they are built: what is computed again is there for one look."""
    again, kept = (dit(**options, checkpoint_activations=c).float() for c in (True, False))
    kept.load_state_dict(again.state_dict())
    x, t, r, labels, drop = (a.float() if a.is_floating_point() else a for a in arguments())
    for net in (again, kept):
        net(x, t, r, labels, drop).square().sum().backward()
    for ours, theirs in zip(again.parameters(), kept.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_mlp_against_func_jvp():
    net = perturbed(Mlp(2, 0, width=16, depth=2, two_times=True)).double()
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(B, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(B, generator=g, dtype=torch.float64)
    r = t / 2
    out = net(Dual(x, v), Dual(t, torch.ones_like(t)), r)
    _, want = torch.func.jvp(lambda x, t: net(x, t, r), (x, t), (v, torch.ones_like(t)))
    assert torch.allclose(out.tangent, want, rtol=0, atol=1e-10)


def one_pass(net, batch: Batch, config: MeanFlow, world: LossContext) -> torch.Tensor:
    """MeanFlow as published implementations compute it: func.jvp of the whole batch with the graph kept."""
    k = round(config.ratio * B)
    t, r = draw_times(batch.sample, k, config, world, torch.float64)
    z, v = world.path.point(batch.x_0, t, world.random.key(rng.NOISE), batch.sample)
    with sdpa_kernel(SDPBackend.MATH):
        u, du = torch.func.jvp(
            lambda z, t, r: net(z, t, r, batch.labels, batch.drop),
            (z, t, r),
            (v, torch.ones_like(t), torch.zeros_like(r)),
        )
    target = (v - (t - r).view(-1, 1, 1, 1) * du).detach()
    squared = (u - target).square().flatten(1).sum(1)
    return squared / (squared.detach() + config.c) ** config.p


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_meanflow_gradients_equal_the_one_pass_func_jvp(ratio):
    net = AverageVelocity(dit())
    x, _, _, labels, drop = arguments()
    batch, config = Batch(x, labels, torch.arange(B), drop), MeanFlow(ratio=ratio)
    world = LossContext(ProbabilityPath("linear"), rng.Random(0, 2, 5))
    grads = []
    for objective in (lambda: meanflow(net, batch, config, world)[0], lambda: one_pass(net, batch, config, world)):
        loss = objective()
        grads.append((loss.detach(), torch.autograd.grad(loss.mean(), list(net.parameters()))))
    assert torch.allclose(*(g[0] for g in grads), rtol=1e-9)
    for ours, theirs in zip(*(g[1] for g in grads)):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-10)


def saved(call) -> list[tuple]:
    kept: list[tuple] = []

    def pack(x):
        kept.append((tuple(x.shape), x.dtype))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sorted(kept, key=str)


def test_dual_forward_saves_what_the_plain_forward_saves():
    net = dit(qk_norm=True, rope=True).float()
    plain = [a.float() if a.is_floating_point() else a for a in arguments()]
    full = [Dual(a.value.float(), a.tangent.float()) if isinstance(a, Dual) else a for a in arguments(B)]
    assert saved(lambda: net(*full)) == saved(lambda: net(*plain)) != []


def test_sizes_have_the_published_parameter_counts():
    for size, millions in {"S": 33, "B": 130, "L": 458, "XL": 675}.items():
        width, depth, heads = SIZES[size]
        with torch.device("meta"):
            net = DiT(4, 8, 1000, width=width, depth=depth, heads=heads)
        count = sum(p.numel() for p in net.parameters())
        assert abs(count / 1e6 - millions) < 0.02 * millions, (size, count)


def test_denoiser_is_edm_preconditioning():
    raw = torch.nn.Module()
    raw.forward = lambda x, t, r, labels, drop: 3 * x + t.view(-1, 1)
    x, t = torch.randn(6, 4).double(), torch.logspace(-2, 1.9, 6).double()
    s, c = 0.5, t.view(-1, 1)
    total = c**2 + s**2
    want = s**2 / total * x + c * s / total.sqrt() * (3 * x / total.sqrt() + c.log() / 4)
    assert torch.allclose(Denoiser(raw, s)(x, t), want)


def test_noise_denoiser_asks_at_ddpms_steps_and_between_them():
    seen = []
    raw = torch.nn.Module()
    raw.forward = lambda x, n, r, labels, drop: (seen.append((x, n)), torch.full_like(x, 2.0))[1]
    denoiser = NoiseDenoiser(raw)
    beta, kept, noises = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)], 1.0, []
    for b in beta:
        kept *= 1 - b
        noises.append(((1 - kept) / kept) ** 0.5)
    middle = (noises[400] * noises[401]) ** 0.5
    t = torch.tensor([noises[0], noises[400], middle, noises[999], 1e-3, 1e3], dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(denoiser(x, t), x - 2 * t[:, None])
    assert torch.allclose(seen[0][1], torch.tensor([0, 400, 400.5, 999, 0, 999]).double(), atol=1e-6)
    assert torch.allclose(seen[0][0], x / (1 + t[:, None] ** 2).sqrt())


def test_label_drop_is_the_null_class():
    net = dit()
    x, t, r, labels, _ = arguments()
    every = torch.ones(B, dtype=torch.bool)
    assert torch.equal(net(x, t, r, labels, every), net(x, t, r, torch.full_like(labels, 5), ~every))


def test_bf16_autocast_keeps_times_in_fp32_and_tangents_close():
    net = dit().float()
    full = [Dual(a.value.float(), a.tangent.float()) if isinstance(a, Dual) else a for a in arguments(B)]
    want = net(*full)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*full)
    error = (got.tangent.float() - want.tangent).norm() / want.tangent.norm()
    assert 1e-4 < error < 0.1


def test_published_embeddings_keep_the_derivative_in_time_small() -> None:
    """Frequencies of at most 1 in place of the project's own: |du/dt| and bf16's error of (t - r) du/dt are several times
    smaller, in the same network; more so in deeper ones (docs/published-settings.md)."""
    figures = {}
    for embeddings in ("cmt", "dit"):
        torch.manual_seed(0)
        net = DiT(4, 16, 0, width=384, depth=3, heads=6, patch=4, two_times=True, embeddings=embeddings)
        with torch.no_grad():
            for p in net.parameters():
                if not p.any():  # gates and the last layer begin at zero
                    p.copy_(0.02 * torch.randn_like(p))
            x, v, t = *torch.randn(2, 8, 4, 16, 16), torch.linspace(0.3, 0.95, 8)
            arguments = Dual(x, v), Dual(t, torch.ones(8)), Dual(t / 2, torch.zeros(8))
            exact = net(*arguments).tangent
            with torch.autocast("cpu", torch.bfloat16):
                rounded = net(*arguments).tangent.float()
        error = (t / 2).view(-1, 1, 1, 1) * (rounded - exact)
        figures[embeddings] = float(exact.norm()), float(error.norm() / v.norm())
    (large, coarse), (small, fine) = figures["cmt"], figures["dit"]
    assert large > 3 * small and coarse > 3 * fine > 0
