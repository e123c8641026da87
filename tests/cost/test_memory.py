"""What a process holds: activations counted on shapes against what autograd keeps here, and the parts that a plan adds up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.training.networks import saved_bytes
from cmt_fast import models
from cmt_fast.config import loading
from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp
from cmt_fast.cost import activations, disk, estimate, memory
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.hardware import CARDS, RESULTS, card
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.run.resolved import resolve
from tests.fixtures.commands import ROOT

SMALL = Edm2(size="XS", width=32, multipliers=(1, 2), blocks=1, attention=(8,), head=16, dropout=0.0)
NETWORKS = {
    "edm2": (SMALL, (4, 16, 16), 10),
    "edm": (
        Edm(preset="cifar10", width=32, multipliers=(1, 2), blocks=1, attention=(8,), dropout=0.0),
        (3, 16, 16),
        10,
    ),
    "dit": (Dit(width=32, depth=3, heads=2), (4, 16, 16), 10),
    "mlp": (Mlp(width=16, depth=2), (2,), 0),
}


def kept(model, shape, classes, rows: int, bf16: bool) -> tuple[int, torch.nn.Module]:
    """Bytes that autograd keeps of a real forward on this CPU."""
    net = models.build(model, "ve", 0.5, shape, classes)
    x, t = torch.randn(rows, *shape), torch.rand(rows) + 0.1
    labels = torch.zeros(rows, dtype=torch.int64) if classes else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return saved_bytes(lambda: net(x, t, t, labels), net), net


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_counted_activations_are_those_that_autograd_keeps(name, bf16):
    model, shape, classes = NETWORKS[name]
    count = activations.of_model(model, "ve", shape, classes, bf16)
    for rows in (2, 5):
        assert count.bytes(rows) == kept(model, shape, classes, rows, bf16)[0]
    assert count.row > 0


def test_in_bf16_a_u_net_keeps_its_normalised_weights_once_and_half_of_each_row():
    exact, half = (activations.of_model(SMALL, "ve", (4, 16, 16), 10, bf16) for bf16 in (False, True))
    net = models.build(SMALL, "ve", 0.5, (4, 16, 16), 10)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert exact.fixed == pytest.approx(4 * weights, rel=0.1) and half.fixed == pytest.approx(2 * weights, rel=0.1)
    assert 0.5 < half.row / exact.row < 0.6


@pytest.mark.parametrize("name", ["edm2", "dit"])
def test_recomputed_blocks_keep_what_passes_between_them_and_the_largest_of_them(name):
    model, shape, classes = NETWORKS[name]
    again = dataclasses.replace(model, checkpoint_activations=True)
    plain, few = (activations.of_model(m, "ve", shape, classes, False) for m in (model, again))
    between = kept(again, shape, classes, 3, False)[0]
    inputs = activations._kept(
        activations._built(again, "ve", shape, classes), activations._call(shape, classes), False
    )
    assert inputs.bytes(3) == between  # what torch's own checkpoint() keeps, which is not called to count
    assert between < few.bytes(3) < plain.bytes(3)
    assert few.bytes(3) - between < plain.bytes(3) - between  # one block, not all


def test_a_feature_network_keeps_what_the_images_gradient_reads():
    net = LatentVgg(4, 1000, 8).requires_grad_(False)
    x = torch.randn(3, 4, 16, 16, requires_grad=True)
    assert activations.of_features("latent_lpips", (4, 16, 16), 8).bytes(3) == saved_bytes(lambda: net.slices(x), net)


def test_a_forward_without_gradient_holds_less_than_a_row_keeps_and_more_than_its_largest_pair():
    model, shape, classes = NETWORKS["edm2"]
    live = activations.working(model, "ve", shape, classes, False)
    assert 2 * 4 * 64 * 16 * 16 < live < activations.of_model(model, "ve", shape, classes, False).row


def test_the_committed_steps_of_a_card_scale_the_count():
    """The H100's measured bytes over this machine's count: computed from the file, near 1, and of DiTs alone."""
    h100 = card("h100", ROOT / RESULTS)
    net = flops_.network(Dit(size="XL"), "linear", (4, 32, 32), 1000)
    ratio, source = memory.saved_ratio(net, h100, "bf16")
    assert 0.8 < ratio < 1.3 and "as measured: h100/step" in source
    assert memory.saved_ratio(net, CARDS["h100"], "bf16") == (1.0, "counted")
    assert memory.saved_ratio(net._replace(depth=0), h100, "bf16") == (1.0, "counted")
    step = next(s for s in h100.steps if s.saved)
    mine = flops_.dit_network(step.width, step.depth, step.tokens)
    only = lambda saved: h100._replace(steps=(step._replace(saved=saved),))
    twice, once = (memory.saved_ratio(mine, only(n * step.saved), step.precision)[0] for n in (2, 1))
    assert twice == pytest.approx(2 * once)


def held(name: str, stage: str, gpus: int, *overrides: str, of: str = "h100") -> memory.Memory:
    run = loading.load(name, overrides)
    rows, resolved = estimate.rows_of(run), resolve(run, stage)
    known, _ = estimate.networks(resolved, rows)
    choice = estimate.sharding_plan(resolved, rows, known, CARDS[of], gpus)
    return estimate.held(resolved, rows, known, choice, CARDS[of], gpus)


def part(found: memory.Memory, begin: str) -> float:
    return sum(p.bytes for p in found.parts if p.what.startswith(begin))


TINY = ("model.width=16", "model.depth=1", "model.heads=2")


def test_micro_batches_precision_and_caches_change_the_parts_that_they_name():
    whole = held("digits", "mid", 1, *TINY)
    halves = held("digits", "mid", 1, *TINY, "mid.micro_batch=32")
    assert part(halves, "activations") == pytest.approx(part(whole, "activations") / 2)
    assert part(halves, "weights") == part(whole, "weights")
    low = held("digits", "mid", 1, *TINY, "mid.trajectories.precision=bf16")
    assert part(low, "teacher's copies") == pytest.approx(part(whole, "teacher and guide") / 2)
    eight = held("digits", "mid", 1, *TINY, "mid.trajectories.precision=fp8")
    assert part(eight, "teacher's copies") == pytest.approx(part(whole, "teacher and guide") / 4)
    few = held("digits", "mid", 1, *TINY, "mid.trajectories.rollout_batch=32")
    assert part(few, "rollouts") == pytest.approx(part(whole, "rollouts") / 10)  # of 320 trajectories
    cached = held("digits", "mid", 1, *TINY, "mid.trajectories.cache=somewhere")
    assert part(cached, "rollouts") == part(cached, "teacher") == 0 and part(cached, "pool") == part(whole, "pool")
    assert part(whole, "pool") == 320 * 17 * 64 * 4
    assert whole.fits and not whole._replace(limit=whole.most - 1).fits
    assert whole.most == whole.at("always") + max(whole.at("step"), whole.at("evaluation"))


@pytest.mark.parametrize(
    "name, stage, rows, nodes, numbers, gigabytes",
    [("imagenet512-ecd", "mid", 800_000, 17, 4 * 64 * 64, 446), ("imagenet256-mf", "mid", 8_000_000, 9, 4 * 32 * 32, 590)],
)  # fmt: skip
def test_bytes_of_a_trajectory_cache_by_hand(name, stage, rows, nodes, numbers, gigabytes):
    run = loading.load(name)
    stored = disk.cache(resolve(run, stage), run.data.expects.shape)
    assert stored == (rows, nodes * numbers * 2 + 16, rows * (nodes * numbers * 2 + 16))
    assert round(stored.bytes / 1e9) == gigabytes
    assert disk.cache(resolve(run, "post"), run.data.expects.shape) is None


def test_rows_of_a_rollout_are_those_that_memory_holds():
    assert memory.rows_that_fit(100e9, 1e9) == int(memory.USABLE * 100) and memory.rows_that_fit(1, 1e9) == 1
    resolved = resolve(loading.load("digits", TINY), "mid")
    one = memory.rollout_bytes([resolved.run.model], resolved, (1, 8, 8), 10, False)
    guided = resolve(loading.load("digits", [*TINY, "mid.trajectories.guidance=2"]), "mid")
    assert memory.rollout_bytes([resolved.run.model], guided, (1, 8, 8), 10, False) > 1.5 * one
