"""The U-Nets as Duals, EDM2's weights held to unit length, dropout that a step can repeat, and a run trained on each."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from cmt_kernels import Dual, dropout
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import ConstantEma, Denoise, Dit, Edm, Edm2, Stage
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.engine import LocalEngine, load_named, named, posthoc_ema
from cmt_fast.models import build, fold
from cmt_fast.models.edm2 import MPLayer
from cmt_fast.objectives import Batch, LossContext
from cmt_fast.objectives.denoise import denoise
from cmt_fast.run import validation
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import batches, loop
from tests.fixtures.tiny import NO_EVAL
from tests.models.test_models import perturbed

B, CPU = 4, torch.device("cpu")
KINDS = {
    "edm2": Edm2(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head=8, dropout=0.2),
    "ddpmpp": Edm(width=8, multipliers=(1, 2), blocks=1, attention=(4,), augment=0),
    "ncsnpp": Edm(preset="cifar10-ncsnpp", width=8, multipliers=(1, 2), blocks=1, attention=(), augment=0),
    "adm": Edm(preset="imagenet64", width=64, multipliers=(1,), blocks=1, attention=()),
}
every_kind = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)


def net_of(model, path: str = "linear", **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return perturbed(build(model, path, 0.5, (2, 8, 8), 5)).double()


def arguments(net: torch.nn.Module, k: int):
    g = torch.Generator().manual_seed(2)
    x, v = (torch.randn(B, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(B, generator=g, dtype=torch.float64)
    labels, drop = torch.arange(B) % 5, torch.arange(B) % 3 == 0
    seeds = rng.Random(0, 1, 2).seeds(rng.DROPOUT, torch.arange(B), net.dropouts)
    times = Dual(t, torch.ones(k).double()), Dual(t / 3, torch.zeros(k).double())
    return Dual(x, v[:k]), *times, labels, drop, seeds


@every_kind
def test_a_unet_against_func_jvp(model):
    net, k = net_of(model), 2
    dual = arguments(net, k)
    plain = [a.value if isinstance(a, Dual) else a for a in dual]
    out = net(*dual)
    assert torch.equal(out.value, net(*plain)) and not out.tangent.requires_grad
    with sdpa_kernel(SDPBackend.MATH):
        _, want = torch.func.jvp(
            lambda x, t, r: net(x, t, r, *(a[:k] for a in plain[3:])),
            tuple(a[:k] for a in plain[:3]),
            tuple(a.tangent for a in dual[:3]),
        )
    assert want.abs().max() > 1e-2
    assert torch.allclose(out.tangent, want, rtol=0, atol=1e-10 * want.abs().max().item())


@every_kind
def test_recomputed_activations_change_no_gradient(model):
    grads = []
    for recomputes in (False, True):
        net = net_of(type(model)(**{**vars(model), "checkpoint_activations": recomputes}))
        out = net(*arguments(net, 2))
        grads.append((out, torch.autograd.grad(out.value.square().sum(), list(net.parameters()), allow_unused=True)))
    assert torch.equal(grads[0][0].value, grads[1][0].value) and torch.equal(grads[0][0].tangent, grads[1][0].tangent)
    for ours, theirs in zip(*(g[1] for g in grads)):
        assert (ours is None) == (theirs is None) and (ours is None or torch.allclose(ours, theirs, rtol=1e-12))


@every_kind
def test_dropout_is_a_function_of_seed_stage_step_and_sample(model):
    net = net_of(model)
    x, t, r, labels, drop, seeds = (a.value if isinstance(a, Dual) else a for a in arguments(net, 2))
    call = lambda seeds, rows=slice(None): net(x[rows], t[rows], r[rows], labels[rows], drop[rows], seeds)
    assert torch.equal(call(seeds), call(seeds)) and not torch.equal(call(seeds), call(None))
    assert torch.allclose(call(seeds[2:], slice(2, None)), call(seeds)[2:])  # another process's half of the batch
    other = rng.Random(0, 1, 3).seeds(rng.DROPOUT, torch.arange(B), net.dropouts)
    assert not torch.allclose(call(other), call(seeds))
    for block in range(net.dropouts):  # each block has its own
        changed = seeds.clone()
        changed[:, block] = other[:, block]
        assert not torch.equal(call(changed), call(seeds)), block
    ids = torch.arange(2000)
    seeds = rng.Random(0, 1, 2).seeds(rng.DROPOUT, ids, 2)
    kept = [dropout(torch.ones(2000, 50), seeds[:, i], 0.2) > 0 for i in (0, 1)]
    for mask in kept:
        assert abs(mask.double().mean().item() - 0.8) < 5 * (0.16 / 1e5) ** 0.5
    agree = (kept[0] == kept[1]).double().mean().item()  # 0.8^2 + 0.2^2 for layers that draw independently
    assert abs(agree - 0.68) < 5 * (0.2176 / 1e5) ** 0.5


def test_weights_stay_at_unit_length_and_averages_do_not_change_by_folding():
    torch.manual_seed(0)
    stage = Stage(objective=Denoise(uncertainty=True), images_nimg=100, ema=(ConstantEma(beta=0.5),))
    engine = LocalEngine(perturbed(build(KINDS["edm2"], "ve", 0.5, (2, 8, 8), 5)), stage, CPU)
    for step in range(3):
        x = torch.randn(B, 2, 8, 8)
        batch = Batch(x, torch.arange(B), torch.arange(B), None)
        loss, _ = denoise(engine, batch, stage.objective, LossContext(ProbabilityPath("ve"), rng.Random(0, 0, step)))
        engine.backward(loss.mean())
        engine.step(1e-2)
    size = lambda m: m.weight.flatten(1).square().mean(1).sqrt()
    layers = [m for m in engine.net.modules() if isinstance(m, MPLayer)]
    assert len(layers) > 20 and all(torch.allclose(size(m), torch.ones(()), atol=3e-4) for m in layers)
    average = engine.average()
    assert any(
        not torch.allclose(size(m), torch.ones(()), atol=1e-3) for m in average.modules() if isinstance(m, MPLayer)
    )
    args = torch.randn(B, 2, 8, 8), torch.rand(B) + 0.1, None, torch.arange(B)
    track = engine.emas[0].clone()
    want, again = average(*args), copy.deepcopy(average)(*args)
    assert torch.equal(want, again)
    folded = fold(average)
    assert torch.allclose(folded(*args), want, rtol=1e-5, atol=1e-6) and torch.equal(engine.emas[0], track)
    assert torch.equal(fold(folded)(*args), folded(*args))


def test_a_weight_of_another_length_is_the_same_layer_with_a_tangential_gradient():
    layer = MPLayer(40, 3).double()
    x = torch.randn(5, 40).double()
    before = layer(x)
    (gradient,) = torch.autograd.grad(before.square().sum(), layer.weight)
    along = (gradient * layer.weight).sum(1).abs() / gradient.norm(dim=1) / layer.weight.norm(dim=1)
    assert along.max() < 1e-3  # the normalisation's eps is 1e-4
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert torch.allclose(layer(x), before, rtol=1e-3)


def test_the_uncertainty_is_the_log_of_the_loss_at_its_minimum():
    """d/du (l/e^u + N u) = 0 at u = ln(l/N): the gradient of u vanishes there and nowhere else."""
    x = torch.randn(B, 2, 8, 8).double()
    batch, world = Batch(x, None, torch.arange(B), None), LossContext(ProbabilityPath("ve"), rng.Random(0, 0, 1))
    call = lambda u: lambda x, t, r, labels, drop, seeds, uncertainty: (torch.zeros_like(x), u)
    plain, _ = denoise(lambda *a: torch.zeros_like(a[0]), batch, Denoise(), world)
    u = (plain / 128).log().requires_grad_()
    loss, _ = denoise(call(u), batch, Denoise(uncertainty=True), world)
    assert torch.allclose(loss, 128 * (1 + u)) and torch.autograd.grad(loss.sum(), u)[0].abs().max() < 1e-9
    off = (u.detach() + 1).requires_grad_()
    assert torch.autograd.grad(denoise(call(off), batch, Denoise(uncertainty=True), world)[0].sum(), off)[0].min() > 1


def test_constants_travel_with_the_weights():
    nets = [build(KINDS["edm2"], "ve", 0.5, (2, 8, 8), 5) for _ in range(2)]
    a, b = (LocalEngine(net, Stage(objective=Denoise(), images_nimg=100), CPU) for net in nets)
    assert not torch.equal(a.net.net.fourier.phase, b.net.net.fourier.phase)
    b.load(a.state(), 0)
    assert torch.equal(a.net.net.fourier.phase, b.net.net.fourier.phase)
    assert "net.fourier.phase" in named(a.net, a.emas[0])
    with pytest.raises(ValueError, match="1 keys missing .*fourier.phase"):
        load_named(b.net, {k: v for k, v in a.state()["model"].items() if k != "net.fourier.phase"})


RECIPES = {
    "edm2": "model={kind: edm2, width: 8, multipliers: [1, 2], blocks: 1, attention: [4], head: 8, dropout: 0.3}",
    "edm": "model={kind: edm, width: 8, multipliers: [1, 2], blocks: 1, attention: [4], log_variance: true}",
}
LENGTHS = [
    f"{s}.{k}" for s in ("pre", "mid", "post") for k in ("images_nimg=48", "batch=8", "checkpoint_every_nimg=16")
]


def tiny(kind: str, *more: str):
    """The digits recipe on a U-Net with dropout, six steps a stage."""
    pools = [f"{s}.trajectories.{k}" for s in ("mid", "post") for k in ("pool_steps=2", "nfe=4")]
    return loading.load(
        "digits", [RECIPES[kind], *LENGTHS, *pools, *NO_EVAL, "control=null", "sampler.teacher_steps=2", *more]
    )


def test_a_training_step_drops_the_same_in_all_its_calls(tmp_path):
    work = Workspace(
        tiny("edm", "post.start=pre", "post.teacher=null", "post.anchor=null", "post.trajectories=null"), tmp_path
    )
    stage = work.run.stages["post"]
    engine = LocalEngine(perturbed(work.build()), stage, CPU)
    source, asked, forward = batches.provider(work, work.stage("post"), engine), [], engine.forward
    engine.forward = lambda *args: (asked.append(args[5]), forward(*args))[1]
    first, again, later = (source.loss(engine, step)[0] for step in (0, 0, 1))
    assert torch.equal(first, again) and len(asked) == 6  # ECT calls at r and at t
    assert all(torch.equal(x, asked[0]) for x in asked[:4]) and not torch.equal(asked[4], asked[0])
    assert torch.equal(asked[4], asked[5]) and asked[0].shape == (8, engine.net.dropouts, 2)
    engine.forward, engine.net.dropouts = forward, 0
    assert not torch.allclose(source.loss(engine, 0)[0], first)  # the loss has the dropout in it


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_that_goes_on_from_a_checkpoint_ends_the_same(kind, tmp_path):
    told = ["pre.augment={p: 0.5}"] if kind == "edm" else []
    run = tiny(kind, "pre.objective.uncertainty=true", "pre.ema=[{kind: power, sigma_rel: 0.1}]", *told)
    loop.train(Workspace(run, tmp_path / "a"), ["pre", "mid", "post"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for stage in ("pre", "mid", "post"):
        *_, last = checkpoint.steps(tmp_path / "b" / stage)
        assert last == 6 and len(checkpoint.steps(tmp_path / "b" / stage)) == 2
        shutil.rmtree(checkpoint.folder_of(tmp_path / "b" / stage, last))
    loop.train(Workspace(run, tmp_path / "b"), ["pre", "mid", "post"])
    for stage in ("pre", "mid", "post"):
        one, two = (checkpoint.complete(tmp_path / x / stage) for x in "ab")
        for file in ("model", "ema-0", "optimizer"):
            x, y = one.tensors(file), two.tensors(file)
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), (stage, file)
    net = Workspace(run, tmp_path / "a").network("post")
    assert all(m.folded for m in net.modules() if isinstance(m, MPLayer))


def test_a_profile_rebuilt_from_snapshots_keeps_the_constants(tmp_path):
    run = tiny(
        "edm2", "pre.ema=[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.1}]", "pre.snapshot_every_nimg=8"
    )
    work = Workspace(run, tmp_path / "run")
    loop.train(work, ["pre"])
    posthoc_ema.reconstruct(tmp_path / "run" / "pre", 0.07, tmp_path / "rebuilt.safetensors")
    rebuilt, stored = load_file(tmp_path / "rebuilt.safetensors"), work.weights("pre")[0]
    assert torch.equal(rebuilt["net.fourier.frequency"], stored["net.fourier.frequency"])
    assert not torch.equal(rebuilt["net.out_gain"], stored["net.out_gain"])
    load_named(work.build(), rebuilt)


def test_dropout_up_to_a_side_is_in_those_blocks_alone():
    """ECT on ImageNet-64 drops where features are 16 x 16 or smaller (locuslab/ect, branch imgnet, `dropout_res`); EDM2 in
    every block."""
    make = lambda **more: build(Edm2(width=8, blocks=1, attention=(8,), head=8, **more), "ve", 0.5, (3, 64, 64), 0).net
    rates = lambda net: {name: b.p for part in (net.encoder, net.decoder) for name, b in part.items()}
    assert set(rates(make(dropout=0.4)).values()) == {0.4}
    net = make(dropout=0.4, dropout_max_side=16)
    assert {name: p for name, p in rates(net).items() if p} == dict.fromkeys(
        ("16x16_down", "16x16_block0", "8x8_down", "8x8_block0", "8x8_in0", "8x8_in1", "16x16_up", "8x8_block1", "16x16_block1"),
        0.4,
    )  # fmt: skip
    assert net.dropouts == len(net.encoder) + len(net.decoder)  # a block's seeds stand at its own place
    assert make(dropout=0.4, dropout_max_side=4).dropouts == 0 == make(dropout=0.0).dropouts


def test_a_block_above_the_side_is_the_same_with_and_without_seeds():
    """What each block gives in a step: the first that is at most 8 wide is the first that the seeds change."""
    net = build(
        Edm2(width=8, blocks=1, attention=(4,), head=8, dropout=0.5, dropout_max_side=4), "ve", 0.5, (2, 16, 16), 0
    ).net
    perturbed(net)
    x, t = torch.randn(B, 2, 16, 16), torch.rand(B)
    given: list[tuple[str, torch.Tensor]] = []
    for name, block in (*net.encoder.items(), *net.decoder.items()):
        block.register_forward_hook(lambda _, __, out, name=name: given.append((name, out)))
    runs = []
    for seeds in (None, rng.Random(0, 1, 2).seeds(rng.DROPOUT, torch.arange(B), net.dropouts)):
        given.clear()
        net(x, t, None, None, None, seeds)
        runs.append(list(given))
    differs = [name for (name, a), (_, b) in zip(*runs) if not torch.equal(a, b)]
    assert differs[0] == "4x4_down"


def test_what_a_network_has_not_is_refused():
    with pytest.raises(ConfigError, match="pre.objective.uncertainty: true needs a model of kind edm2"):
        validation.check(loading.load("digits", ["pre.objective.uncertainty=true"]), (1, 8, 8), 10)
    for model, words in (
        (Edm2(), "model.multipliers: 4 levels need a side divisible by 8"),
        (Edm2(multipliers=(1,), head=100), "model.head: heads of width 100"),
        (Edm(width=10, multipliers=(1,)), "model.width: 10 is not a multiple of 4"),
        (Dit(precondition="ddpm"), "model.precondition: 'ddpm' is for the path 've'"),
    ):
        with pytest.raises(ValueError, match=words):
            build(model, "linear", 0.5, (1, 12, 12), 10)
    with pytest.raises(ValueError, match="model.kind: an edm2 needs square images"):
        build(Edm2(), "ve", 0.5, (2,), 0)
