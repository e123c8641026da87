"""Guidance and dropped labels in a world with a known answer: two Gaussians, one a class, and both where there is no label.

The denoisers and flow maps of the classes and of both together are closed form, so what a guided teacher predicts, where its
trajectories lead with labels and without, and what a student is at rest with are known.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast.config.schema import CmtCm, CmtMf, Ecd, Gmm, Scd, Trajectories
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Autoguided, guided
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import Random
from cmt_fast.evaluation import theory
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points
from cmt_fast.teacher.pool import Pool, Prior, starts

VE, LINEAR, STD = ProbabilityPath("ve"), ProbabilityPath("linear"), 0.25
BOTH = Gmm(components=2, radius=1.0, std=STD)  # means (1, 0) and (-1, 0)
NONE = 2  # the label of the null class
ROWS = 512


def centre(labels: Tensor) -> Tensor:
    """The mean of each row's class. (B, 2) float64."""
    x = torch.where(labels == 0, 1.0, -1.0).double()
    return torch.stack((x, torch.zeros_like(x)), dim=1)


class Two:
    """D(x, t) on VE or v(z, t) on linear flow of each row's class; of both classes where the label is NONE or dropped."""

    def __init__(self, path: ProbabilityPath = VE) -> None:
        self.path, self.both = path, Exact(BOTH, path)
        self.told: list[Tensor] = []  # the labels that it was asked with

    def __call__(self, x, t, r=None, labels=None, drop=None):
        self.told.append(labels.clone())
        labels = labels if drop is None else labels.masked_fill(drop, NONE)
        alpha, sigma, alpha_dot, sigma_dot = (column(c, x) for c in self.path.coefficients(t))
        m, variance = centre(labels).to(x.dtype), alpha**2 * STD**2 + sigma**2
        d = m + alpha * STD**2 / variance * (x - alpha * m)
        one = d if self.path.name == "ve" else alpha_dot * d + sigma_dot * sigma / variance * (x - alpha * m)
        return torch.where((labels == NONE)[:, None], self.both(x, t), one)


def consistency(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Where the ODE leads, at t = .002: a class in closed form, both classes by many steps of their own."""
    m, end = centre(labels).to(x.dtype), 0.002
    shrink = column(torch.sqrt((STD**2 + end**2) / (STD**2 + t**2)), x)
    return torch.where((labels == NONE)[:, None], theory.solve(Exact(BOTH, VE), x, t, 300), m + shrink * (x - m))


def pool(teacher, dropout: float, path: ProbabilityPath = VE, seed: int = 0, rows: int = ROWS) -> Pool:
    times = {"t_max": 80.0, "t_min": 0.002} if path is VE else {"t_max": 1.0, "t_min": 0.0}
    solver = {"solver": "dpmpp", "order": 3} if path is VE else {"solver": "heun"}
    how = Trajectories(nfe=128, per_trajectory=1, pool_steps=1, **solver, **times)
    return Pool(teacher, path, how, Prior((2,), 2, seed, 1, dropout), rows, torch.device("cpu"))


def draw(pool: Pool, step: int = 0) -> Points:
    points = pool.draw(step, torch.arange(pool.rows))
    return points._replace(**{k: getattr(points, k).double() for k in ("x", "t", "x_r", "r")})


@functools.cache
def dropped() -> Points:
    return draw(pool(Two(), 0.3))


# ------------------------------------------------------------------------------------------ the guided network


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_guidance_tilts_the_mean_by_hand(scale: float) -> None:
    """At x = 0 nothing tells the classes apart: D_null = 0, D_class = m t^2 / (s^2 + t^2), so guided it is scale times that.

    Scale 1 is the network with its label, scale 0 without (hao-ai-lab/FastVideo#217 took cond + w (cond - null)).
    """
    labels, t = torch.tensor([0, 1]), torch.tensor([0.3, 5.0]).double()
    x = torch.zeros(2, 2).double()
    found = guided(Two(), scale)(x, t, t, labels)
    torch.testing.assert_close(found, scale * centre(labels) * column(t**2 / (STD**2 + t**2), x))


def test_every_channel_is_guided() -> None:
    """facebookresearch/DiT#41: its code guides the first three of four latent channels, by a mistake that was kept."""
    net = lambda x, t, r, labels, drop: torch.ones_like(x) * (~drop).view(-1, 1, 1, 1)
    x, t, labels = torch.randn(2, 5, 4, 4), torch.ones(2), torch.tensor([0, 1])
    assert torch.equal(guided(net, 3.0)(x, t, t, labels), torch.full_like(x, 3.0))


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_a_row_without_label_is_not_guided(scale: float) -> None:
    """Null against null: the same bits as the network alone, whatever the scale; labelled rows move."""
    net, labels, t = Two(), torch.tensor([NONE, 0, NONE, 1]), torch.full((4,), 0.7).double()
    x = torch.randn(4, 2).double()
    plain, found = net(x, t, t, labels), guided(net, scale)(x, t, t, labels)
    none = labels == NONE
    assert torch.equal(found[none], plain[none]) and (found[~none] - plain[~none]).abs().max() > 1e-3


def test_guided_trajectories_lead_further_apart_and_unlabelled_ones_as_before() -> None:
    plain, tilted = (pool(guided(Two(), scale), 0.3) for scale in (1.0, 2.0))
    a, b = draw(plain), draw(tilted)
    none = a.labels == NONE
    assert torch.equal(a.labels, b.labels) and torch.equal(a.x_r[none], b.x_r[none])
    side = centre(a.labels)[~none, 0]
    assert float((side * a.x_r[~none, 0]).mean()) == pytest.approx(1.0, abs=0.06)
    assert float((side * b.x_r[~none, 0]).mean()) > 1.1


# ------------------------------------------------------------------------------------------ dropped labels in mid-training


def test_a_share_of_trajectories_starts_without_label_for_the_teacher_too() -> None:
    """With the published 10 % about 10 % of trajectories have none (huggingface/open-muse#143 dropped the other 90 %)."""
    teacher = Two(LINEAR)
    points = draw(pool(teacher, 0.1, LINEAR, rows=4096))
    assert points.drop is None and int(points.labels.max()) == NONE
    assert float((points.labels == NONE).double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / 4096) ** 0.5)
    without = sum(int((told == NONE).sum()) for told in teacher.told)
    assert without == 128 * int((points.labels == NONE).sum())  # in each of its calls


def test_without_dropout_every_bit_is_as_it_was() -> None:
    """The draw of what is dropped has its own stream: noise, other labels and order do not know of it."""
    random, ids = Random(3, 1, 5), torch.arange(200)
    config = Trajectories()
    x, labels = starts(random, ids, (2,), 2, VE, config)
    y, some = starts(random, ids, (2,), 2, VE, config, 0.25)
    assert torch.equal(x, y) and torch.equal(labels, random.integers(rng.START_LABEL, ids, 2))
    kept = some != NONE
    assert torch.equal(some[kept], labels[kept]) and 20 < int((~kept).sum()) < 80
    assert torch.equal(kept, random.uniform(rng.START_DROP, ids) >= 0.25)
    plain, zero = draw(pool(Two(), 0.0)), draw(pool(Two(), 1e-12))
    assert all(torch.equal(a, b) for a, b in zip(plain, zero) if a is not None)


def test_what_is_dropped_is_a_function_of_seed_round_and_trajectory() -> None:
    first, again = pool(Two(), 0.3), pool(Two(), 0.3)
    rounds = [draw(first, step) for step in (0, 1)]
    assert torch.equal(draw(again, 1).labels, rounds[1].labels) and torch.equal(draw(again, 0).labels, rounds[0].labels)
    assert not torch.equal(rounds[0].labels == NONE, rounds[1].labels == NONE)
    assert not torch.equal(draw(pool(Two(), 0.3, seed=1)).labels == NONE, rounds[0].labels == NONE)


def loss_at(kind: str, config, points: Points, told: Tensor) -> tuple[float, float]:
    """Largest loss of the right student, told these labels: of rows that were rolled out without label, and with one."""
    known = lambda x, t, r=None, labels=None, drop=None: consistency(x, t, told)
    loss, _ = OBJECTIVES[kind].function(known, points, config, LossContext(VE, Random(0, 0, 0)))
    none = points.labels == NONE
    return float(loss[none].max()), float(loss[~none].max())


def test_cmt_is_at_rest_where_teacher_and_student_go_without_label_together() -> None:
    """The loss of the right answer is the solver's error, for both kinds of rows.

    A student that misses the label of a trajectory that had one, as where labels are dropped a second time in the network, or
    has one that the trajectory had not (black-forest-labs/Self-Flow#10 asks which), is not at rest.
    """
    points, config = dropped(), CmtCm(distance="squared_l2")
    none, labelled = loss_at("cmt_cm", config, points, points.labels)
    assert none < 1e-4 and labelled < 1e-4
    assert loss_at("cmt_cm", config, points, torch.full_like(points.labels, NONE))[1] > 1
    assert loss_at("cmt_cm", config, points, points.labels.clamp(max=1))[0] > 1


def test_cmt_of_flow_maps_has_the_average_velocity_without_label() -> None:
    """At rest at u = (z - Psi_{t->r}(z)) / (t - r), Psi of both classes together where there is no label."""
    points = draw(pool(Two(LINEAR), 0.3, LINEAR))
    some = (points.labels == NONE).nonzero().flatten()[:4]
    x, t, r = points.x[some], points.t[some], points.r[some]
    few = Points(x, t, points.x_r[some], r, points.labels[some], None)

    def loss(components: int) -> Tensor:
        exact = Exact(Gmm(components=components, radius=1.0, std=STD), LINEAR)
        end = torch.cat([exact.flow_map(x[i : i + 1], float(t[i]), float(r[i]), 200) for i in range(len(x))])
        net = lambda x, t, r, labels, drop: (x - end) / column(t - r, x)
        return OBJECTIVES["cmt_mf"].function(net, few, CmtMf(), LossContext(LINEAR, Random(0, 0, 0)))[0]

    assert len(x) == 4 and float(loss(2).max()) < 1e-4 and float(loss(1).max()) > 0.1


# ------------------------------------------------------------------------------------------ dropped labels in distillation


def rows(drop: float = 0.3) -> Batch:
    """Data rows as a stage that drops labels gives them: a dropped row's label is the null class's."""
    sample, random = torch.arange(ROWS), Random(0, 0, 9)
    labels = sample % 2
    x_0 = centre(labels) + STD * random.normal(rng.DATA, sample, (2,)).double()
    mask = random.uniform(rng.DROP, sample) < drop
    return Batch(x_0, labels.masked_fill(mask, NONE), sample, mask)


def test_ecd_is_at_rest_where_the_teachers_step_goes_without_label_too() -> None:
    """Heun's steps of 1/64 of the right teacher; a teacher that is told the labels leads dropped rows elsewhere."""
    batch, config = rows(), Ecd(q=64, k=0, distance="squared_l2", weight="one", mean=0.0, std=0.3)
    known = lambda x, t, r=None, labels=None, drop=None: consistency(x, t, labels.masked_fill(drop, NONE))

    def loss(teacher) -> Tensor:
        return OBJECTIVES["ecd"].function(known, batch, config, LossContext(VE, Random(0, 0, 0), teacher))[0]

    right = loss(Two())
    wrong = loss(lambda x, t, r, labels: Two()(x, t, r, torch.arange(ROWS) % 2))
    none = batch.drop
    assert float(right.max()) < 1e-6
    assert float(wrong[none].mean()) > 1e3 * float(right[none].mean()) and torch.equal(wrong[~none], right[~none])


def test_scd_asks_the_teacher_without_label_too() -> None:
    batch, teacher = rows(), Two()

    class Student:
        def __call__(self, x, t, r, labels, drop):
            value = consistency(x.value, t.value, labels).requires_grad_()
            return Dual(value, torch.zeros_like(value))

    context = LossContext(VE, Random(0, 0, 0), guided(teacher, 2.0))
    OBJECTIVES["scd"].function(Student(), batch, Scd(), context)
    assert all(bool((told.view(-1, ROWS) == batch.labels).all()) for told in teacher.told) and len(teacher.told) == 1


def test_classifier_free_guidance_by_a_network_of_no_labels_is_autoguidance() -> None:
    """NVlabs/edm2#12: EDM2 guides without labels by a network of its own. Autoguided by it, it is classifier-free guidance."""
    x, t, labels = torch.randn(6, 2).double(), torch.rand(6).double() + 0.2, torch.arange(6) % 2
    unconditional = lambda x, t, r, labels: Exact(BOTH, VE)(x, t)
    torch.testing.assert_close(
        Autoguided(Two(), unconditional, 1.7)(x, t, t, labels), guided(Two(), 1.7)(x, t, t, labels)
    )
