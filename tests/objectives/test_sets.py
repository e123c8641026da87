"""Losses over sets of rows: the same sets however a step is split, each at rest where distributions agree, and what breaks a set
refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Drift, Imm
from cmt_fast.data.order import ClassOrder
from cmt_fast.data.rows import Dataset
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.rng import Random
from cmt_fast.evaluation.rest import LINEAR, VE, average_velocity, batch, consistency, errors, in_sets, size, world
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.objectives import OBJECTIVES, Batch, StageContext, drift, imm, sets
from cmt_fast.perceptual.distance import Distance
from cmt_fast.run import validation
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.train import nonfinite
from tests.fixtures.tiny import source_of, tiny
from tests.objectives import peers

ALONE = ["post.anchor=null", "post.trajectories=null", "post.teacher=null"]
IMM, DRIFT = "post.objective={kind: imm}", "post.objective={kind: drift, group: 8}"


# ------------------------------------------------------------------------------------------ which rows are a set


@pytest.mark.parametrize("config, path", [(Imm(group=3), "linear"), (Drift(group=3), "linear"), (Drift(group=3), "ve")])
@pytest.mark.parametrize("shards", [2, 4])
def test_sets_are_the_same_over_any_number_of_passes_and_processes(config: Any, path: str, shards: int) -> None:
    """24 rows in one pass, and each shard's own: every row has the same loss."""
    whole = batch(24)
    net, at = peers.network(path), world(LINEAR if path == "linear" else VE)
    run = lambda rows: OBJECTIVES[config.kind].function(net, rows, config, at)[0].detach()
    mine = lambda x, i: None if x is None else x[i::shards]
    loss = run(whole)
    for i in range(shards):
        torch.testing.assert_close(run(Batch(*(mine(x, i) for x in whole))), loss[i::shards], rtol=1e-9, atol=0)
    assert loss.unique().numel() == 24


def test_rows_and_places() -> None:
    """Row i is of set i mod G; gathered and scattered are each other's inverse; positions put sets one after the other."""
    rows = torch.arange(12)
    assert sets.gathered(rows, 3).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert torch.equal(sets.scattered(sets.gathered(rows, 3)), rows) and sets.firsts(rows, 3).tolist() == [0, 1, 2, 3]
    assert sets.positions(rows, 12, 3).view(3, 4).T.flatten().tolist() == list(range(12))
    with pytest.raises(ConfigError, match="objective.group: 5 does not divide the 12 rows"):
        sets.firsts(rows, 5)


def test_rows_of_a_class_are_together_and_come_once() -> None:
    labels = torch.randint(3, (100,), generator=torch.Generator().manual_seed(0))
    data = Dataset(torch.randn(100, 2), labels, 3)
    order = ClassOrder(data, 7, "cpu", 8)
    length = int((labels.bincount() // 8).sum()) * 8
    assert order.length == length < 100
    index, epoch = order(torch.arange(2 * length))
    for e in range(2):
        rows = index[epoch == e]
        assert rows.unique().numel() == length and (labels[rows].view(-1, 8) == labels[rows].view(-1, 8)[:, :1]).all()
    first, second = (index[epoch == e].sort().values for e in range(2))
    assert not torch.equal(first, second)  # those left out of one epoch are in another
    assert torch.equal(ClassOrder(data, 7, "cpu", 8)(torch.arange(40, 50))[0], index[40:50])
    assert not torch.equal(labels[index[::8][:10]], labels[index[::8][:10]].sort().values)  # classes are mixed
    with pytest.raises(ConfigError, match="objective.group: 40 rows of one class are a set, and class 0 has 21 rows"):
        ClassOrder(data, 7, "cpu", 40)


def test_a_stage_is_given_sets_of_one_class_however_it_is_split(monkeypatch) -> None:
    """Over processes and passes the same sets of the same rows, each of one class."""
    source = source_of(Workspace(tiny("digits", *ALONE, DRIFT), Path("nowhere")), "post")

    def seen(step: int, processes: int, parts: int) -> Tensor:
        """The sum of each set's rows, sorted."""
        found = []
        monkeypatch.setattr(distributed, "size", lambda: processes)
        source.grad_accum_steps = parts
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            source._step = -1
            for part in range(parts):
                d = source.draw(step, part).own
                labels = sets.gathered(d.labels, 8)
                assert (labels == labels[:, :1]).all()
                found += sets.gathered(d.x_0, 8).flatten(1).sum(1).tolist()
        return torch.tensor(found).sort().values

    whole = [seen(step, 1, 1) for step in range(2)]
    assert whole[0].unique().numel() == 4 and not torch.equal(*whole)
    for processes, parts in ((1, 2), (2, 1), (2, 2)):
        for step in range(2):
            torch.testing.assert_close(seen(step, processes, parts), whole[step])
    source.close()


def test_a_step_that_is_not_finite_names_the_rows_of_its_sets() -> None:
    """What is written of it are the rows that the step had, not those of a loader that puts no class together."""
    source = source_of(Workspace(tiny("digits", *ALONE, DRIFT), Path("nowhere")), "post")
    guard = SimpleNamespace(source=source, engine=SimpleNamespace(grad_accum_steps=1))
    rows = nonfinite.Guard._rows(guard, 3)  # type: ignore[arg-type]
    assert rows["batch"] == list(range(32))
    x_0, _ = source.data.rows(torch.tensor(rows["data"]))
    assert torch.equal(x_0, source.draw(3).own.x_0)
    source.close()


# ------------------------------------------------------------------------------------------ the losses


def test_imm_draws_by_the_papers_formulas() -> None:
    """One (s, r, t) a set, noise of each row; eta falls by eta_max / 2^k or to s; the weight by its terms; z_r on the path."""
    rows, config = batch(600), Imm(group=4, a=1.5, b=3.0)
    d = imm.draw(rows, config, world(LINEAR))
    for x in (d.t, d.r, d.s):
        of_sets = sets.gathered(x, 4)
        assert (of_sets == of_sets[:, :1]).all() and of_sets[:, 0].unique().numel() == 150
    assert (
        (d.s <= d.r).all()
        and (d.r <= d.t).all()
        and (d.t < 0.994).all()
        and float(d.t.mean()) == pytest.approx(0.5, abs=0.05)
    )
    free = d.r > d.s
    eta = lambda t: t / (1 - t)
    torch.testing.assert_close(eta(d.t)[free] - eta(d.r)[free], torch.full((int(free.sum()),), 160 / 2**12).double())
    assert 0 < int(free.sum()) < 600
    eps = (d.z_t - (1 - d.t)[:, None] * rows.x_0) / d.t[:, None]
    torch.testing.assert_close(d.z_r, (1 - d.r)[:, None] * rows.x_0 + d.r[:, None] * eps)  # the same noise
    torch.testing.assert_close(eps, Random(0, 0, 0).normal(rng.NOISE, rows.sample, (2,)).double(), rtol=1e-5, atol=1e-6)
    t = d.t.clone().requires_grad_()
    snr = 2 * torch.log((1 - t) / t)
    (slope,) = torch.autograd.grad(snr.sum(), t)
    want = 0.5 * torch.sigmoid(3.0 - snr) * -slope * (1 - t) ** 1.5 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(imm.weight(d.t, config), want.detach())


def test_a_jump_of_no_length_is_finite() -> None:
    """s = t: targets are the points themselves, and neither weights nor gradients are infinite."""
    net, half = peers.network("linear"), torch.full((4,), 0.5).double()
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    loss, _ = imm.loss(net, imm.Drawn(z, z, half, half, half, None, None), Imm(), StageContext(LINEAR))
    grad = torch.autograd.grad(loss.sum(), list(net.parameters()), materialize_grads=True)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grad)


def test_a_set_may_be_compared_with_its_own_target_or_not() -> None:
    """As published a row is drawn to its own target, which holds most of a small step's signal and, at the answer, a bias; it
    falls as 1/M. Without, only the others pull."""
    at = lambda m, diagonal, theta=0.0: in_sets(
        "imm", average_velocity, Imm(group=m, diagonal=diagonal), LINEAR, theta, 4000
    )
    assert 3 < size(at(4, True, 1.0)) / size(at(16, True, 1.0)) < 5
    assert size(at(16, False, 1.0)) < size(at(16, True, 1.0)) / 5


def test_drift_is_at_rest_on_ve_too() -> None:
    rest, off = (in_sets("drift", consistency, Drift(), VE, theta, 3200) for theta in (0.0, 1.0))
    assert errors(rest) < 4 and errors(off) > 10


def test_drift_goes_where_data_are_and_samples_are_not() -> None:
    """Samples in one place, data in two: each is sent to the nearer one, and two samples in one place part."""
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [-0.1, 0.0], [0.0, 0.05]]).double()
    y = torch.tensor([[1.0, 0.0], [1.1, 0.0], [-1.0, 0.0], [-1.1, 0.0]]).double()
    force = drift._forces(x[None, None], y[None, None], (0.2,))[0][0, 0]
    assert force[1, 0] > 0 > force[2, 0] and force[3, 1] > force[0, 1]


def test_a_features_space_is_that_of_the_networks_maps() -> None:
    """Means and deviations over the image and over 4 x 4 fields of each of five maps, where fields have two numbers a side; they
    carry a gradient to the samples and none to the network."""
    torch.manual_seed(0)
    net = LatentVgg(1, 10, 4)
    stage = StageContext(LINEAR, perceptual=Distance(net, None, True))
    x = torch.randn(6, 1, 16, 16, requires_grad=True)
    found = drift.features(x, Drift(space="latent_lpips"), stage)
    maps = net.slices(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16)] * 3 + [(8, 8), (4, 4)]
    assert [f.shape[1] for f in found] == [1, 1, 16, 16] * 4 + [1, 1]
    torch.testing.assert_close(found[1][:, 0], (maps[0].var((2, 3), unbiased=False) + 1e-6).sqrt())
    torch.testing.assert_close(found[2][:, 5], maps[0][:, :, 4:8, 4:8].mean((2, 3)))
    sum(f.sum() for f in found).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="objective.space: 'latent_lpips' needs a network"):
        drift.features(x, Drift(space="latent_lpips"), StageContext(LINEAR))


def test_drifts_own_figure_falls_where_its_loss_does_not() -> None:
    """The loss is in units of each force's own size; `drift` is the force as it is: of samples off by 1, and of right ones."""
    rows, config = batch(640), Drift()
    losses, figures = [], []
    for known in (lambda z, t, r: average_velocity(z, t, r) + 1, average_velocity):
        at = OBJECTIVES["drift"].function(lambda z, t, r, *_, known=known: known(z, t, r), rows, config, world(LINEAR))
        losses.append(float(at[0].mean())), figures.append(float(at[1]["drift"]))
    assert figures[1] < figures[0] / 2 and all(1 < x < 9.1 for x in losses)


# ------------------------------------------------------------------------------------------ what is refused


REFUSED = [
    ("digits", [IMM], 1, "post.objective.kind: 'imm' is for the path 'linear', this run's is 've'"),
    ("digits-mf", ["post.objective={kind: imm, group: 5}"], 1, "post.objective.group: 5 rows are a set, and the objective's 32"),
    ("digits-mf", [IMM, "post.micro_batch=2"], 1, "post.objective.group: 4 rows are a set, and 32 rows over 16 passes of 1"),
    ("digits-mf", [IMM], 16, "are 2 rows a pass, which it does not divide; take a batch of a multiple of 64 rows"),
    ("digits-mf", ["post.objective={kind: imm, group: 1, diagonal: false}"], 1, "post.objective.diagonal: false leaves sets"),
    ("digits", [DRIFT, "post.label_dropout=0.1"], 1, "post.label_dropout: 0.1 with objective.by_class: a set of one class"),
    ("digits", [DRIFT, "loader={kind: dali}"], 1, "loader.kind: 'dali' puts no rows of a class together"),
    ("digits", [DRIFT, "sampler.t_max=40"], 1, "post.objective.t_max: the generator takes its noise at 80, and samples begin at"),
    ("digits-mf", ["post.objective={kind: drift, group: 8, t_max: 0.9}"], 1, "post.objective.t_max: 0.9 on the path 'linear'"),
    ("digits", ["post.objective={kind: drift, group: 8, space: latent_lpips}"], 1, "post.perceptual.weights: is missing"),
    ("digits", ["post.objective={kind: drift, group: 1}"], 1, "post.objective.group: 1"),
    ("digits", ["post.objective={kind: drift, space: features}"], 1, "post.objective.space: 'features'"),
]  # fmt: skip


@pytest.mark.parametrize("recipe, keys, processes, said", REFUSED)
def test_what_breaks_a_set_is_refused(recipe: str, keys: list[str], processes: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run = tiny(recipe, *ALONE, *keys)
        validation.check(run, (1, 8, 8), 10)
        resolve(run, "post").grad_accum_steps(processes)
    assert said in str(caught.value)


def test_a_class_too_small_for_a_set_is_named_before_anything_is_trained() -> None:
    work = Workspace(
        tiny("digits", *ALONE, "post.batch=600", "post.objective={kind: drift, group: 200}"), Path("nowhere")
    )
    with pytest.raises(
        ConfigError, match="post.objective.group: 200 rows of one class are a set, and class [0-9] has 1[0-9]+"
    ):
        source_of(work, "post")


def test_weights_are_finite_at_every_time() -> None:
    found = imm.weight(torch.tensor([0.0, 1e-20, 1e-7, 0.5, 0.994]), Imm())
    assert found.isfinite().all() and found[0] == 0
    assert float(found[3]) == pytest.approx(0.5 * 0.5 / ((0.25 + math.exp(-4) / 4) * 0.5), rel=1e-6)
