"""sCM's learned weights of times, and the log variance that a network of any kind has for them by a key."""

from __future__ import annotations

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor, nn

from cmt_fast.config import fingerprint, loading, renames
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Denoise, Dit, Edm, Mlp, Scd, Sct
from cmt_fast.diffusion import rng
from cmt_fast.models import build
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext
from cmt_fast.objectives.denoise import denoise
from cmt_fast.run import networks
from tests.objectives.test_family import VE, Random, perturbed, published

KINDS = {
    "mlp": (Mlp(width=8, depth=1), (2,)),
    "dit": (Dit(width=16, depth=1, heads=2, patch=4), (2, 8, 8)),
    "dit of noise": (Dit(width=16, depth=1, heads=2, patch=4, precondition="ddpm"), (2, 8, 8)),
    "edm": (Edm(width=8, multipliers=(1, 2), blocks=1, attention=(4,)), (2, 8, 8)),
}


def with_head(kind: str, head: bool = True) -> nn.Module:
    model, shape = KINDS[kind]
    torch.manual_seed(0)
    return build(type(model)(**{**vars(model), "log_variance": head}), "ve", 0.5, shape, 3)


def rows(kind: str, n: int = 6) -> Batch:
    labels = torch.arange(n) % 3
    x_0 = 0.5 * torch.randn(n, *KINDS[kind][1], generator=torch.Generator().manual_seed(1)).double()
    return Batch(x_0, labels, torch.arange(n), labels == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_changes_nothing_beside_it(kind: str) -> None:
    """The same first weights and outputs to the bit, tangents too; the head has two tensors more and begins at weight 1."""
    plain, net = with_head(kind, False), with_head(kind)
    names = {"net.log_variance.out.weight", "net.log_variance.out.bias"}
    mine, theirs = net.state_dict(), plain.state_dict()
    assert mine.keys() - theirs.keys() == names
    assert all(torch.equal(mine[k], x) for k, x in theirs.items())
    perturbed(net)
    plain.double().load_state_dict({k: x for k, x in net.state_dict().items() if k in theirs})
    x, labels, _, drop = rows(kind)
    t = torch.tensor([0.01, 0.1, 0.4, 1.0, 8.0, 80.0]).double()
    given = Dual(x, torch.ones_like(x[:4])), Dual(t, t[:4]), None, labels, drop
    want, (got, u) = plain(*given), net(*given, None, True)
    assert torch.equal(got.value, want.value) and torch.equal(got.tangent, want.tangent)
    assert torch.equal(net(x, t, None, labels, drop), want.value) and u.shape == (6,) and len(set(u.tolist())) == 6
    assert not with_head(kind)(x.float(), t.float(), None, labels, drop, None, True)[1].any()


@pytest.mark.parametrize("kind", ["sct", "scd"])
@pytest.mark.parametrize("network", ["mlp", "dit"])
def test_loss_is_the_published_one(kind: str, network: str) -> None:
    """e^w(t)/D ||F - F^- - g||^2 - w(t) of Lu & Song 2024, and its gradient in the head too."""
    net, batch = perturbed(with_head(network)), rows(network)
    config = (Sct if kind == "sct" else Scd)(warmup_nimg=1000, uncertainty=True)
    world = LossContext(VE, Random(3, 2, 1), perturbed(with_head(network, False)) if kind == "scd" else None, nimg=250)
    ours, scalars = OBJECTIVES[kind].function(net, batch, config, world)
    if network == "mlp":
        theta_free = published(net, batch, config, world)
    else:  # the published form is written for vectors: a row's own loss, of the same network without weights
        theta_free, _ = OBJECTIVES[kind].function(net, batch, type(config)(warmup_nimg=1000), world)
    t = torch.exp(config.mean + config.std * world.random.gauss(rng.TIME, batch.sample)).double()
    w = -net.net.log_variance(t.log() / 4)
    theirs = w.exp() * theta_free - w
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    torch.testing.assert_close(scalars["log_variance"], -w.detach(), rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss.mean(), list(net.parameters()), allow_unused=True) for loss in (ours, theirs)]
    assert all((a is None) == (b is None) for a, b in zip(*grads))
    for a, b in zip(*grads):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def weighed(u: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of `sct` with this log variance and without any, of one network. (B,), (B,)."""
    inner = perturbed(with_head("mlp", False))  # which seeds its own dice
    net = lambda *a: (inner(*a[:5]), u) if len(a) > 6 and a[6] else inner(*a[:5])
    at = LossContext(VE, Random(0, 0, 5))
    return tuple(OBJECTIVES["sct"].function(net, rows("mlp"), Sct(uncertainty=on), at)[0] for on in (True, False))


def test_at_rest_the_weight_is_one_over_the_expected_loss() -> None:
    """d/du (L e^-u + u) is 0 at u = ln L, where the weighted loss is 1 at every time, and nowhere else."""
    _, plain = weighed(torch.zeros(6).double())
    u = plain.detach().log().requires_grad_()
    loss, _ = weighed(u)
    torch.testing.assert_close(loss, 1 + u)
    assert torch.autograd.grad(loss.sum(), u)[0].abs().max() < 1e-9
    off = (u.detach() + 1).requires_grad_()
    assert torch.autograd.grad(weighed(off)[0].sum(), off)[0].min() > 0.5


@pytest.mark.parametrize("kind", ["dit", "dit of noise"])
def test_a_denoiser_of_any_kind_learns_its_weights(kind: str) -> None:
    """EDM2's loss of pre-training, l/e^u + N u of N numbers, with u of ln(t)/4 whatever else the network reads of t."""
    net, batch = perturbed(with_head(kind)), rows(kind)
    at = LossContext(VE, Random(0, 0, 1))
    plain, _ = denoise(net, batch, Denoise(), at)
    loss, _ = denoise(net, batch, Denoise(uncertainty=True), at)
    u = net.net.log_variance((-1.2 + 1.2 * at.random.gauss(rng.TIME, batch.sample).double()) / 4)
    torch.testing.assert_close(loss, plain / u.exp() + 128 * u)


def test_where_there_is_no_head_or_no_use_of_one() -> None:
    check = lambda name, *keys: networks.check(loading.load(name, list(keys)), (1, 8, 8), 10)
    for stage, kind in (("pre", "denoise"), ("post", "sct")):
        alone = ["post.anchor=null", "post.trajectories=null", "post.teacher=null"]
        keys = [*alone, f"{stage}.objective={{kind: {kind}, uncertainty: true}}"]
        with pytest.raises(
            ConfigError, match=f"{stage}.objective.uncertainty: true needs .*edm2 or model.log_variance true"
        ):
            check("digits", *keys)
        check("digits", *keys, "model.log_variance=true")
    with pytest.raises(ValueError, match="model.log_variance: true is for the path 've'"):
        check("digits-mf", "model.log_variance=true")


def test_a_run_of_before_keeps_its_digest() -> None:
    """Keys of today at their defaults say nothing, where the kind had them before they still do."""
    keys = ["post.objective={kind: sct}", "post.anchor=null", "post.trajectories=null", "post.teacher=null"]
    run = loading.load("digits", keys)
    old = renames.first_names(loading.dump(run))
    assert "uncertainty" not in old["post"]["objective"] and "uncertainty" in old["pre"]["objective"]
    assert "log_variance" not in old["model"]
    on = loading.load("digits", [*keys, "post.objective.uncertainty=true", "model.log_variance=true"])
    assert renames.first_names(loading.dump(on))["post"]["objective"]["uncertainty"] is True
    assert fingerprint.digest(on) != fingerprint.digest(run)
