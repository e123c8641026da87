"""Improved MeanFlow whole: guidance as an input of the network, the auxiliary head; against torch.func.jvp, and by command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast import api
from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dit, IMeanFlow, Mlp
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import column
from cmt_fast.diffusion.rng import Random
from cmt_fast.evaluation.rest import LINEAR
from cmt_fast.models import build
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext
from cmt_fast.objectives.meanflow import draw_times, scale_of, told
from cmt_fast.render import plots
from cmt_fast.report import page, scales
from cmt_fast.run.workspace import Workspace, open_stage
from cmt_fast.storage import sound
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny
from tests.objectives.test_family import perturbed

DIT = Dit(width=16, depth=2, heads=2, patch=4, guided=True, velocity_head=1)
TOLD = ["model.guided=true", "model.velocity_head=1", "post.objective={kind: imeanflow, head: true, omega_max: 8}"]
ALONE = ["post.anchor=null", "post.trajectories=null", "post.teacher=null"]
KEYS = [*TOLD, *ALONE, "pre.label_dropout=0.1", "post.label_dropout=0.1"]


def network(kind: str) -> torch.nn.Module:
    model = Mlp(width=16, depth=2, guided=True, velocity_head=1) if kind == "mlp" else DIT
    return perturbed(build(model, "linear", 0.5, (2,) if kind == "mlp" else (2, 8, 8), 3))


def rows(kind: str) -> Batch:
    labels = torch.arange(16) % 3
    return Batch(
        torch.randn(16, *((2,) if kind == "mlp" else (2, 8, 8))).double(), labels, torch.arange(16), labels == 2
    )


@pytest.mark.parametrize("kind", ["mlp", "dit"])
@pytest.mark.parametrize("head, most", [(True, 8.0), (False, 8.0), (True, 1.0)])
def test_loss_and_gradients_are_those_of_the_paper(kind: str, head: bool, most: float) -> None:
    """Written out in the paper's order: guided target, direction of the own velocity, jvp, both losses."""
    net, batch, config = network(kind), rows(kind), IMeanFlow(p=0.75, c=0.03, head=head, omega_max=most)
    world = LossContext(LINEAR, Random(1, 2, 3))
    t, r = draw_times(batch.sample, 8, config, world, torch.float64)
    z, v = LINEAR.point(batch.x_0, t, world.random.key(rng.NOISE), batch.sample)
    one = torch.ones_like(t)
    guide = told(batch.sample, 8, config, world, torch.float64)
    call = lambda z, t, r, drop, omega, low, high: net(
        z, t, r, batch.labels, drop, None, True, torch.stack((omega, low, high), 1)
    )
    instant = lambda drop, omega: call(z, t, t, drop, omega, 0 * one, one)[1 if head else 0].detach()
    omega, low, high = guide.unbind(1) if guide is not None else (one, 0 * one, one)
    inside = torch.where((t >= low) & (t <= high), omega, one)
    v_c, v_u = instant(batch.drop, inside), instant(torch.ones_like(batch.drop), one)
    v_g = torch.where(column(batch.drop, v).bool(), v, v + column(1 - 1 / inside, v) * (v_c - v_u))
    with sdpa_kernel(SDPBackend.MATH):
        (u, u_dot) = torch.func.jvp(
            lambda z, t, r: call(z, t, r, batch.drop, omega, low, high)[0], (z, t, r), (v_c, one, 0 * one)
        )
    weighted = lambda e: (l := e.square().flatten(1).sum(1)) / (l.detach() + 0.03) ** 0.75
    want = weighted(u + column(t - r, z) * u_dot.detach() - v_g)
    want = want + weighted(call(z, t, r, batch.drop, omega, low, high)[1] - v_g) * head
    got, scalars = OBJECTIVES["imeanflow"].function(net, batch, config, world)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
    assert ("head_mse" in scalars) == head and (guide is None) == (most == 1)
    grads = [torch.autograd.grad(loss.mean(), list(net.parameters()), materialize_grads=True) for loss in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_a_network_that_is_told_nothing_is_told_no_guidance(kind: str) -> None:
    net, batch = network(kind), rows(kind)
    t = torch.linspace(0.1, 1, 16).double()
    call = lambda *more: net(batch.x_0, t, t / 2, batch.labels, None, *more)
    none = torch.tensor([[1.0, 0.0, 1.0]]).double().expand(16, 3)
    assert torch.equal(call(), call(None, False, none))
    assert not torch.allclose(call(), call(None, False, none * torch.tensor([4.0, 1, 1])))
    assert not torch.allclose(call(), call(None, False, none * torch.tensor([1.0, 1, 0.5])))
    along = Dual(batch.x_0, torch.ones_like(batch.x_0[:4])), Dual(t, torch.ones_like(t[:4]))
    u, v = net(*along, t / 2, batch.labels, None, None, True)
    assert torch.equal(u.value, call()) and v.shape == u.value.shape and not isinstance(v, Dual)


def test_a_fresh_network_is_what_it_is_without() -> None:
    """Told or not, and with a head or not: its new parts begin at zero, and what stands beside them begins as it does without."""
    made = []
    for model in (Dit(width=16, depth=2, heads=2, patch=4), DIT):
        torch.manual_seed(0)
        made.append(build(model, "linear", 0.5, (2, 8, 8), 3))
    guide = made[1].net.guidance(torch.tensor([[5.0, 0.2, 0.7]]), torch.zeros(1))
    assert not bool(guide.any()) and not bool(made[1].net.velocity_final.weight.any())
    assert set(made[0].state_dict()) < set(made[1].state_dict())


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_a_stage_that_is_told_none_says_the_same_at_every_scale(kind: str) -> None:
    """Flow matching trains nothing of what guidance adds: its network, judged at a scale, is what it is without."""
    model = Mlp(width=16, depth=2, guided=True) if kind == "mlp" else dataclasses.replace(DIT, velocity_head=None)
    net, batch = build(model, "linear", 0.5, (2,) if kind == "mlp" else (2, 8, 8), 3).double(), rows(kind)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for own in (net.net.guidance.omega, net.net.guidance.low, net.net.guidance.high):
        torch.nn.init.zeros_(own.out.weight)
    optimizer, t = torch.optim.SGD(net.parameters(), 0.1), torch.linspace(0.1, 1, 16).double()
    before = net(batch.x_0, t, t, batch.labels)
    for _ in range(2):
        optimizer.zero_grad()
        net(batch.x_0, t, t, batch.labels).square().mean().backward()
        optimizer.step()
    after = net(batch.x_0, t, t, batch.labels)
    guide = torch.tensor([[7.5, 0.4, 0.65]]).double().expand(16, 3)
    assert not torch.equal(before, after)
    assert torch.equal(after, net(batch.x_0, t, t, batch.labels, None, None, False, guide))


@pytest.mark.parametrize("beta, median", [(1.0, 8**0.5), (0.0, 4.5), (2.0, 16 / 9)])
def test_law_of_the_scale(beta: float, median: float) -> None:
    """By the density 1/omega^beta in [1, 8]; 0 is uniform."""
    shares = torch.tensor([0.0, 0.5, 1.0]).double()
    torch.testing.assert_close(scale_of(shares, 8.0, beta), torch.tensor([1.0, median, 8.0]).double())


def test_rows_at_one_time_are_told_the_whole_interval() -> None:
    guide = told(torch.arange(4000), 2000, IMeanFlow(omega_max=8), LossContext(LINEAR, Random(0, 0, 0)), torch.float64)
    assert guide is not None and bool((guide[:, 0] >= 1).all()) and bool((guide[:, 0] <= 8).all())
    first, rest = guide[:2000], guide[2000:]
    assert torch.equal(rest[:, 1:].unique(dim=0), torch.tensor([[0.0, 1.0]]).double())
    assert abs(float(first[:, 1].mean()) - 0.25) < 0.02 and abs(float(first[:, 2].mean()) - 0.75) < 0.02


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run whose post-training told its network scales."""
    folder = tmp_path_factory.mktemp("told") / "run"
    loop.train(
        Workspace(tiny("digits-mf", *KEYS, "sampler.told_guidance=[2, 0.25, 0.75]"), folder), ["pre", "mid", "post"]
    )
    return folder


def test_a_trained_network_is_told_at_sampling(trained: Path, tmp_path: Path, capsys) -> None:
    """Three stages; samples at two scales differ, the line says which; what cannot be done is said."""
    (tmp_path / "run").symlink_to(trained)
    drawn: list[Tensor] = []
    for scale in ([], ["--guidance", "6"]):
        out = tmp_path / f"{len(drawn)}.npz"
        assert main(["sample", str(tmp_path / "run" / "post"), "-n", "8", "--out", str(out), *scale]) == 0
        drawn.append(torch.from_numpy(np.load(out)["images"]))
    assert bool(drawn[0].isfinite().all()) and not torch.equal(*drawn)
    assert "at guidance 6" in capsys.readouterr().out
    assert (
        main(
            ["sample", str(tmp_path / "run" / "post"), "-n", "2", "--guidance", "0.5", "--out", str(tmp_path / "x.npz")]
        )
        == 2
    )
    for stage, scale, line in (("mid", "2", "was told none in training"), ("post", "9", "was told scales from 1 to 8")):
        of = str(tmp_path / "run" / stage)
        assert main(["sample", of, "-n", "2", "--guidance", scale, "--out", str(tmp_path / "x.npz")]) == 2
        assert line in capsys.readouterr().err
    assert main(["ckpt", "export", str(tmp_path / "run" / "post"), str(tmp_path / "x.pt"), "--format", "dit"]) == 2
    assert "dit has no place for model.guided True" in capsys.readouterr().err


def test_scales_in_turn_are_those_of_each_alone(trained: Path, tmp_path: Path, capsys) -> None:
    """Row by row, whatever the batch; every class has each scale equally often; what is written says which."""
    of, out = f"{trained}/post", tmp_path / "three.npz"
    assert main(["sample", of, "-n", "60", "--guidance", "1,2,4", "--batch", "7", "--out", str(out)]) == 0
    assert "at guidance 1, 2 and 4 in turn" in capsys.readouterr().out
    found = np.load(out)
    alone = {w: api.sample(of, 60, guidance=w)[0].numpy() for w in (1, 2, 4)}
    for i, w in enumerate(found["guidance"]):
        np.testing.assert_allclose(found["images"][i], alone[w][i], atol=2e-6)
    pairs = set(zip(found["labels"].tolist(), found["guidance"].tolist()))
    two = open_stage(of)[0].setting.told(1.0, 4.0).omega(torch.arange(20))
    assert torch.equal(two[:10], 5 - two[10:])  # the second of each class has the other of two scales
    assert len(pairs) == 30 and not np.allclose(alone[1], alone[4], atol=1e-4)
    np.testing.assert_array_equal(alone[2], api.sample(of, 60)[0].numpy())  # the recipe's
    x, _ = api.sample(of, 60, guidance=(1, 2, 4))
    np.testing.assert_allclose(x.numpy(), found["images"], atol=2e-6)
    for asked, line in (
        (("post", "1,9"), "--guidance: 9.0 is told to a network that was told scales from 1 to 8"),
        (("post", "2,2"), "--guidance: '2,2' has a scale twice"),
        (("post", "much"), "--guidance: 'much' is not a list of scales"),
        (("pre", "1,2"), "the ODE solver takes one scale at a time"),
    ):
        assert main(["sample", f"{trained}/{asked[0]}", "-n", "2", "--guidance", asked[1], "--out", str(out)]) == 2
        assert line in capsys.readouterr().err


def test_scales_are_judged_in_one_call_and_stay(trained: Path, capsys, monkeypatch) -> None:
    """Each as alone; kept beside the weights that they are of, shown on the page; judged again they are not there twice."""
    of = f"{trained}/post"
    assert main(["eval", of, "-n", "40", "--steps", "1", "--guidance", "1,4", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert "steps" not in out and "told_guidance" not in out and out["guidance"]["4"]["interval"] == [0.25, 0.75]
    alone = api.evaluate(of, (1,), 40, guidance=4)["1"]
    assert alone["frechet"] == out["guidance"]["4"]["steps"]["1"]["frechet"]
    assert out["guidance"]["1"]["steps"] != out["guidance"]["4"]["steps"]
    assert main(["eval", of, "-n", "40", "--steps", "1", "--guidance", "4,2"]) == 0
    said = capsys.readouterr().out
    assert "at guidance 2 in [0.25, 0.75]" in said and "told guidance" not in said
    kept = sound.read(trained / "post" / scales.FILE)["sets"]
    assert [one["scale"] for one in kept] == [1, 4, 2] and kept[1]["steps"] == out["guidance"]["4"]["steps"]
    monkeypatch.setattr(plots, "svg", lambda *_, **size: "<svg></svg>")  # a fifth of a second each
    page.write(trained, judge=False)
    said = (trained / "report.md").read_text()
    (row,) = (x for x in said.splitlines() if x.startswith(r"| 4 | \[0.25, 0.75\] |"))
    assert f"{kept[1]['steps']['1']['frechet']:.3g} " in row and "## At several scales of guidance" in said
    assert not scales.known([trained / "post"], "other weights")
    for stage, scale, line in (
        ("mid", "2", "was told none in training"),
        ("post", "1,8.5", "was told scales from 1 to 8"),
    ):
        assert main(["eval", f"{trained}/{stage}", "-n", "40", "--guidance", scale]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, without, line",
    [
        ("model.guided", "model.guided=false", "post.objective.omega_max: 8.0 needs a network that is told"),
        (
            "model.velocity_head",
            "model.velocity_head=null",
            "post.objective.head: true needs the network's auxiliary head",
        ),
        ("dropout", "post.label_dropout=0", "post.label_dropout: 0.0 with post.objective.omega_max 8.0"),
        (
            "kappa",
            "post.objective={kind: imeanflow, omega_max: 8, kappa: 0.5}",
            "post.objective.omega_max: 8.0 beside omega and",
        ),
        ("head", "post.objective.kappa=0.5", "post.objective.head: true beside omega and kappa"),
        ("beyond", "sampler.told_guidance=[9, 0, 1]", "sampler.told_guidance: 9.0 is above 8"),
        ("depth", "model.velocity_head=9", "model.velocity_head: 9 blocks are more than"),
        ("sampler", "sampler.told_guidance=[3, 0.7, 0.2]", "sampler.told_guidance: "),
    ],
)
def test_what_cannot_be_told_is_refused(key: str, without: str, line: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=line.replace("[", r"\[")):
        Workspace(tiny("digits-mf", *KEYS, without), Path("nowhere")).build()


def test_a_consistency_function_is_told_nothing() -> None:
    with pytest.raises(ValueError, match="model.guided: is for the path 'linear'"):
        Workspace(loading.load("digits", ["model.guided=true"]), Path("nowhere")).build()
