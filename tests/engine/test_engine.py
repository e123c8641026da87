"""The engine's flat buffers, EMA profiles and their post-hoc reconstruction, data order, metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmt_fast import engine, schedule
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import ConstantEma, Denoise, Digits, PowerEma, Stage
from cmt_fast.data import datasets
from cmt_fast.data.order import Loader
from cmt_fast.engine import LocalEngine, ema
from cmt_fast.evaluation import distances, features, judges, tallies

CPU = torch.device("cpu")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def stage(**more) -> Stage:
    return Stage(**({"objective": Denoise(), "images_nimg": 1000, "lr": 1e-2} | more))


def test_engine_equals_torch_adamw_clip_and_a_plain_ema():
    ours, theirs = net(), net()
    e = LocalEngine(ours, stage(weight_decay=0.1, grad_clip_norm=0.5, ema=(ConstantEma(beta=0.9),)), CPU)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    average = [p.detach().clone() for p in theirs.parameters()]
    for step in range(1, 30):
        x = torch.randn(16, 5)
        e.backward(e(x).square().sum())
        e.step(1e-2)
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        beta = min(0.9, (1 + step) / (10 + step))
        average = [beta * a + (1 - beta) * p.detach() for a, p in zip(average, theirs.parameters())]
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, atol=1e-5)
    for p, a in zip(e.average().parameters(), average):
        assert torch.allclose(p, a, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_radam_is_the_optimizer_of_torch(decay):
    """Fifty steps, the first five of which do not trust the variance yet."""
    for betas in ((0.9, 0.999), (0.9, 0.99)):
        ours, theirs = net(), net()
        e = LocalEngine(ours, stage(optimizer="radam", betas=betas, weight_decay=decay, grad_clip_norm=0.0), CPU)
        optimizer = torch.optim.RAdam(
            theirs.parameters(), lr=1e-2, betas=betas, weight_decay=decay, decoupled_weight_decay=True
        )
        moved = []
        for _ in range(50):
            x, before = torch.randn(16, 5), e.p.clone()
            e.backward(e(x).square().sum())
            e.step(1e-2)
            optimizer.zero_grad()
            theirs(x).square().sum().backward()
            optimizer.step()
            moved.append((e.p - before).norm())
        assert min(moved) > 0
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_average_is_the_track_and_training_does_not_touch_a_frozen_copy():
    e = LocalEngine(net(), stage(), CPU)
    average = e.average()
    assert all(not p.requires_grad for p in average.parameters())
    e.emas[0].fill_(2.0)
    assert all((p == 2).all() for p in average.parameters())


def test_state_round_trip_and_a_wrong_checkpoint():
    a = LocalEngine(net(), stage(ema=(ConstantEma(), PowerEma(sigma_rel=0.1))), CPU)
    for _ in range(3):
        a.backward(a(torch.randn(4, 5)).square().sum())
        a.step(1e-2)
    b = LocalEngine(net(), a.stage, CPU)
    b.load(a.state(), 3)
    for x, y in zip((a.p, a.m, a.v, *a.emas), (b.p, b.m, b.v, *b.emas)):
        assert torch.equal(x, y)
    weights = engine.named(a.net, a.p)
    with pytest.raises(ValueError, match="1 keys missing .first: 0.weight., 1 unknown"):
        b.start_from({"other": weights["0.weight"], **{k: v for k, v in weights.items() if k != "0.weight"}})
    with pytest.raises(ValueError, match="0.bias is"):
        b.start_from(weights | {"0.bias": torch.zeros(2)})


def test_a_clip_published_for_the_mean_is_of_the_sum_times_its_numbers():
    """l2 losses here are sums over a row's N numbers, averaged over rows: clipped at N they step as their mean clipped at 1,
    which is how MF-RAE and REPA state a clip; clipped at 1 they do not. (NVlabs/FastGen#25: the scale of the reduction
    matters where nothing normalises it.)"""
    n, steps = 3, 12
    scale = [10.0 if step % 3 == 0 else 0.1 for step in range(steps)]  # some gradients are clipped, some are not
    inputs = torch.randn(steps, 16, 5, generator=torch.Generator().manual_seed(1))

    def ours(clip: float) -> torch.Tensor:
        e = LocalEngine(net(), stage(grad_clip_norm=clip, eps=1e-30), CPU)
        for x, by in zip(inputs, scale):
            e.backward(e(by * x).square().sum(1).mean())
            e.step(1e-2)
        return torch.cat([p.detach().flatten() for p in e.net.parameters()])

    theirs, seen = net(), []
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-30)
    for x, by in zip(inputs, scale):
        optimizer.zero_grad()
        theirs(by * x).square().mean().backward()
        seen.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)))
        optimizer.step()
    assert min(seen) < 1 < max(seen)
    want = torch.cat([p.detach().flatten() for p in theirs.parameters()])
    torch.testing.assert_close(ours(float(n)), want, rtol=1e-4, atol=1e-5)
    assert float((ours(1.0) - want).abs().max()) > 1e-3


def test_power_profile_has_its_width():
    for sigma_rel in (0.05, 0.1, 0.2):
        n = 4000
        weights, scale = np.zeros(n), 1.0
        for step in range(n, 0, -1):
            b = ema.beta(PowerEma(sigma_rel=sigma_rel), step)
            weights[step - 1], scale = (1 - b) * scale, scale * b
        t = np.arange(1, n + 1) / n
        mean = (weights * t).sum()
        assert abs(weights.sum() - 1) < 1e-9
        assert abs(np.sqrt((weights * (t - mean) ** 2).sum()) - sigma_rel) < 0.02 * sigma_rel + 1e-3


def test_widths_are_those_of_edm2():
    """sigma_rel .05 and .1 are gamma 16.97 and 6.94 (Karras et al. 2024, sec. 3.1); a gamma is no width (in a port that
    takes either, 100 was tried as one: kohya-ss/sd-scripts#1100)."""
    assert ema.gamma(0.05) == pytest.approx(16.97, abs=5e-3) and ema.gamma(0.1) == pytest.approx(6.94, abs=5e-3)
    for width in (0.02, 0.15, 0.25):
        g = ema.gamma(width)
        assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(width**2)
    with pytest.raises(ConfigError, match="pre.ema.0.sigma_rel: 6.94 is not valid"):
        loading.load("digits", ["pre.ema=[{kind: power, sigma_rel: 6.94}]"])


def test_post_hoc_reconstruction_finds_an_untracked_profile():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((2000, 8)), axis=0)
    tracked, target = (0.05, 0.1), 0.08
    state = {s: np.zeros(8) for s in (*tracked, target)}
    snapshots: list[tuple[int, float, np.ndarray]] = []
    for step in range(1, 2001):
        for s in state:
            b = ema.beta(PowerEma(sigma_rel=s), step)
            state[s] = b * state[s] + (1 - b) * walk[step - 1]
        if step % 100 == 0:
            snapshots += [(step, s, state[s].copy()) for s in tracked]
    weights = ema.reconstruction_weights([s[0] for s in snapshots], [s[1] for s in snapshots], 2000, target)
    got = sum(w * s[2] for w, s in zip(weights, snapshots))
    nearest = min(np.linalg.norm(state[s] - state[target]) for s in tracked)
    assert np.linalg.norm(got - state[target]) < 0.1 * nearest


def profile_product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The inner product of two power profiles (step, sigma_rel), by the midpoint rule on their common part."""
    t = (np.arange(100_000) + 0.5) * (min(a[0], b[0]) / 100_000)
    density = lambda step, g: (g + 1) * t**g / step ** (g + 1)
    return float((density(a[0], ema.gamma(a[1])) * density(b[0], ema.gamma(b[1]))).sum() * (t[1] - t[0]))


@pytest.mark.parametrize(
    "snapshots, target",
    [
        ([(100, 0.1)], (100, 0.05)),
        ([(100, 0.05), (100, 0.1)], (100, 0.2)),
        ([(60, 0.05), (100, 0.05), (100, 0.1)], (100, 0.15)),
    ],
)
def test_weights_of_snapshots_are_least_squares_over_their_sum(snapshots, target):
    """NVlabs/edm2 `solve_posthoc_coefficients`: the normal equations of the profiles, solved and divided by the sum.

    Profiles multiplied by quadrature here; what is the same in every snapshot comes back."""
    weights = ema.reconstruction_weights(*map(list, zip(*snapshots)), *target)
    a = np.array([[profile_product(x, y) for y in snapshots] for x in snapshots])
    solved = np.linalg.solve(a, np.array([profile_product(x, target) for x in snapshots]))
    assert abs(solved.sum() - 1) > 1e-3  # the sum has to be made 1
    np.testing.assert_allclose(weights, solved / solved.sum(), rtol=1e-5)
    assert abs(weights.sum() - 1) < 1e-12
    still = np.float32(0.1234567) * np.ones(5, np.float32)
    assert np.array_equal(sum(w * still.astype(float) for w in weights).astype(np.float32), still)


def test_schedule_and_learning_rate():
    s = stage(images_nimg=12800, batch=128, warmup_nimg=1280, checkpoint_every_nimg=1000)
    plan = schedule.schedule(s)
    assert plan.total == 100 and plan.warmup == 10 and plan.checkpoint_every % plan.log_every == 0
    rates = [plan.lr(s, i) for i in range(100)]
    assert rates[0] == pytest.approx(1e-3) and max(rates) < 1e-2 and rates[-1] == pytest.approx(1e-4)
    flat = schedule.schedule(stage(images_nimg=12800, batch=128))
    assert {flat.lr(stage(lr_schedule="constant"), i) for i in range(100)} == {1e-2}
    falling = stage(lr_schedule="inverse_sqrt", lr_knee_nimg=1280)
    rates = [flat.lr(falling, i) for i in range(100)]
    assert rates[:11] == [1e-2] * 11 and rates[40] == pytest.approx(5e-3) and rates[90] == pytest.approx(1e-2 / 3)


def test_each_epoch_reads_every_row_once_in_a_new_order():
    digits = datasets.load(Digits())
    rows, n, orders = Loader(digits, 0, CPU), digits.n, []
    for epoch in range(2):
        x, labels = rows.rows(torch.arange(epoch * n, (epoch + 1) * n))
        assert torch.equal(x.flatten(1).sum(1).sort().values, digits.x.flatten(1).sum(1).sort().values)
        orders.append(labels)
    assert not torch.equal(*orders)
    x, _ = rows.rows(torch.arange(n - 3, n + 3))
    assert x.shape == (6, 1, 8, 8)


def test_frechet_of_known_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    a = distances.Moments(torch.zeros(3).double(), eye)
    assert distances.frechet(a, a) == 0
    assert distances.frechet(a, distances.Moments(torch.full((3,), 2.0).double(), 4 * eye)) == pytest.approx(12 + 3)
    g = torch.Generator().manual_seed(0)
    roots = [torch.randn(3, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    c, d = (r @ r.T for r in roots)
    cross = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    want = c.trace() + d.trace() - 2 * cross
    assert distances.frechet(distances.Moments(a.mean, c), distances.Moments(a.mean, d)) == pytest.approx(
        float(want), rel=1e-9
    )


def test_sliced_wasserstein_of_a_shift():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=g)
    assert distances.sliced_wasserstein(x, x) == 0
    assert distances.sliced_wasserstein(x, x + torch.tensor([3.0, 0.0])) == pytest.approx(3 / 2**0.5, rel=0.1)


def test_the_classifier_is_good_reproducible_and_named_by_its_hash(tmp_path):
    digits = datasets.load(Digits())
    a, b = features.extractor(digits, tmp_path / "a"), features.extractor(digits, tmp_path / "b")
    again = features.extractor(digits, tmp_path / "a")
    assert a.name == b.name == again.name and a.name.startswith("classifier-64-32@")
    assert (a.classes(digits.x) == digits.labels).float().mean() > 0.98
    assert tallies.figures(judges.Judge(digits, a), digits.x, digits.labels)["frechet"] < 1e-6
