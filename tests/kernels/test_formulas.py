"""What has an authority outside this repository: Philox's published vectors, torch's AdamW, laws an op must obey."""

from __future__ import annotations

import cmt_kernels
import pytest
import torch
import torch.nn.functional as F
from cmt_kernels import OPS, use
from cmt_kernels.cases import backends_on, cases_of, implementation
from cmt_kernels.philox import Key, integers, uniform
from cmt_kernels.philox import normal as philox_normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.formulas import normal, philox

ONES = 0xFFFFFFFF
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", RANDOM123, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert philox(counter, key) == answer
    block, sample, step, stream = counter
    monkeypatch.setattr(torch, "arange", lambda n, device: torch.tensor([block]))  # blocks count from 0 otherwise
    with use("random_bits:reference"):  # which the others equal bit for bit
        bits = integers(Key(seed=key[0], stage=key[1], step=step, stream=stream), torch.tensor([sample]), blocks=1)
    assert tuple(bits.flatten().tolist()) == answer


def test_noise_depends_on_nothing_but_its_key_and_row() -> None:
    key, sample = Key(seed=-1, stage=2, step=3, stream=4), torch.tensor([7, 2**31 + 5, 0])
    whole = philox_normal(key, sample, (3, 5))
    for i in range(3):
        assert torch.equal(philox_normal(key, sample[i : i + 1], (3, 5))[0], whole[i])
    assert torch.equal(philox_normal(key, sample, (15,)), whole.flatten(1))
    assert torch.equal(philox_normal(key, sample, (4,)), whole.flatten(1)[:, :4])
    for other in (key._replace(seed=0), key._replace(stage=0), key._replace(step=0), key._replace(stream=0)):
        assert not torch.isclose(philox_normal(other, sample, (15,)), whole.flatten(1)).any()
    torch.testing.assert_close(whole.flatten(1), normal(key, sample.tolist(), 15, torch.float64).float())


def test_noise_is_normal_and_uniform() -> None:
    """Sample means within four standard errors: deterministic, since the numbers are."""
    n = 2**16
    z = philox_normal(Key(1, 2, 3, 4), torch.arange(4), (n // 4,)).double()
    for moment, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs((z[:, ::2] * z[:, 1::2]).mean()) < 4 * (2 / n) ** 0.5
    u = uniform(Key(1, 2, 3, 4), torch.arange(4), n // 4)
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5


@pytest.mark.parametrize("name", backends_on("adamw_ema", "cpu"))
def test_adamw_is_the_optimizer_of_torch(name: str) -> None:
    """Twenty steps in float64 with clipping and decay, against torch.optim.AdamW and clip_grad_norm_."""
    start, grads = torch.randn(77, dtype=torch.float64), torch.randn(20, 77, dtype=torch.float64)
    theirs, ema = start.clone().requires_grad_(), start.clone()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    p, m, v, track = start.clone(), torch.zeros_like(start), torch.zeros_like(start), start.clone()
    for step, g in enumerate(grads, start=1):
        theirs.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 5.0)
        optimizer.step()
        ema = 0.9 * ema + 0.1 * theirs.detach()
        ours = implementation("adamw_ema", name)(p, g, m, v, [track], [0.9], step, 1e-2, (0.9, 0.99), 1e-8, 0.1, 5.0)
        torch.testing.assert_close(ours, norm, rtol=1e-10, atol=0)
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(track, ema, rtol=1e-10, atol=1e-10)


def test_attention_is_math_attention_and_softmax_rows_sum_to_one() -> None:
    qkv = torch.randn(3, 7, 3, 2, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(cmt_kernels.attention(qkv), exact, rtol=1e-10, atol=1e-10)
    qkv[:, :, 2] = 1
    torch.testing.assert_close(cmt_kernels.attention(qkv), torch.ones_like(exact), rtol=1e-10, atol=1e-10)


def test_norm_of_modulated_rows() -> None:
    zero = torch.zeros(3, 72, dtype=torch.float64)
    y = cmt_kernels.modulated_norm(torch.randn(3, 5, 72, dtype=torch.float64), zero, zero, eps=0.0)
    torch.testing.assert_close(y.mean(-1), torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, 5, dtype=torch.float64), rtol=1e-10, atol=0)


def test_rope_is_relative() -> None:
    """Scores of rotated queries and keys depend on the difference of positions only."""
    angle = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
    qkv = torch.randn(1, 1, 3, 1, 4, dtype=torch.float64).expand(1, 6, 3, 1, 4)
    q, k, v = cmt_kernels.qk_norm(qkv, cos=angle.cos(), sin=angle.sin())[0, :, :, 0].unbind(1)
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-10, atol=1e-10)
    assert torch.equal(v, qkv[0, :, 2, 0])


def test_path_point_recovers_its_noise() -> None:
    """x_t and v of the linear flow: x_0 = x_t - t v, eps = x_t + (1 - t) v."""
    case = next(case for case in cases_of("path_point").CASES if case.path == "flow")
    inputs = cases_of("path_point").inputs(case, torch.float64)
    x_t, v = cmt_kernels.path_point(**inputs)
    t = inputs["sigma"].view(-1, *[1] * len(case.shape))
    eps = philox_normal(inputs["key"], inputs["sample"], case.shape).double()
    torch.testing.assert_close(x_t - t * v, inputs["x_0"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x_t + (1 - t) * v, eps, rtol=1e-10, atol=1e-10)


def test_losses_at_their_minimum() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    for distance in ("squared_l2", "l2", "pseudo_huber"):
        (grad,) = torch.autograd.grad(cmt_kernels.consistency_loss(x, x.detach(), distance).sum(), x)
        assert not grad.count_nonzero(), distance
    target = torch.randn(3, 5, requires_grad=True)
    cmt_kernels.consistency_loss(x, target).sum().backward()
    assert target.grad is None
    with pytest.raises(ValueError, match="manhattan"):
        cmt_kernels.consistency_loss(x, target, "manhattan")


@pytest.mark.parametrize("op", OPS)
def test_public_function_runs_the_forced_backend(op: str) -> None:
    module = cases_of(op)
    for name in backends_on(op, "cpu"):
        with use(f"{op}:{name}"):
            public = getattr(cmt_kernels, op)(**module.inputs(module.CASES[-1]))
        direct = implementation(op, name)(**module.inputs(module.CASES[-1]))
        torch.testing.assert_close(public, direct, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", backends_on("adamw_ema", "cpu"))
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, value: float) -> None:
    torch.manual_seed(0)
    p, g, m, v, track = (torch.randn(1001).square() for _ in range(5))
    half = p.bfloat16()
    g[77] = value
    before = [x.clone() for x in (p, m, v, track, half)]
    norm = implementation("adamw_ema", name)(p, g, m, v, [track], [0.9], 3, 1e-2, (0.9, 0.99), 1e-8, 0.1, 5.0, half)
    assert norm.isnan() and all(map(torch.equal, before, (p, m, v, track, half)))
