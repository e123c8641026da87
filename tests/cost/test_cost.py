"""The cost model against the reference's tables: counted FLOPs, and predictions that its formulas must give again.

Times are predictions of the same assumptions, made before this project and rounded to microseconds; none was measured.
"""

from __future__ import annotations

import json

import cmt_kernels
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmt_fast import models
from cmt_fast.config import loading, recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dit, Edm, Edm2
from cmt_fast.cost import estimate, savings, step_time
from cmt_fast.cost import flops as flops_
from cmt_fast.cost.estimate import Way
from cmt_fast.cost.flops import Network, Term
from cmt_fast.cost.hardware import CARDS, NAMES, card
from cmt_fast.cost.published import AYF, BUDGETS, ECD, ECT, MEANFLOW, TRAIN
from cmt_fast.models.vgg import LatentVgg, PixelVgg
from cmt_fast.run.resolved import resolve

SIDE = {256: (4, 32, 32), 1024: (4, 64, 64)}


def dit(size: str, tokens: int) -> Network:
    return flops_.network(Dit(size=size), "linear", SIDE[tokens], 1000)


@pytest.mark.parametrize(
    "size, tokens, flops, attention, dual",
    [("B", 256, 46.0, 2.4, 2.05), ("B", 1024, 212.7, 38.7, 2.18), ("L", 256, 161.4, 6.4, 2.04),
     ("L", 1024, 721.9, 103.1, 2.14), ("XL", 256, 237.2, 8.5, 2.04), ("XL", 1024, 1049.0, 135.3, 2.13)],
)  # fmt: skip
def test_a_forward_of_a_dit(size, tokens, flops, attention, dual):
    net = dit(size, tokens)
    assert net.flops / 1e9 == pytest.approx(flops, abs=0.06)
    assert net.attention / 1e9 == pytest.approx(attention, abs=0.06)
    assert 1 + flops_.flops("tangent", net) / net.flops == pytest.approx(dual, abs=0.006)


def test_the_closed_form_counts_what_the_products_are():
    model = Dit(size="S", embeddings="dit", mlp="swiglu")
    for two_times in ("ve", "linear"):
        net = flops_.network(model, two_times, (4, 32, 32), 10)
        count, flops = flops_._counted(
            lambda path=two_times: models.build(model, path, 0.5, (4, 32, 32), 10), (4, 32, 32), True
        )
        assert net.parameters == count and net.flops == pytest.approx(flops, rel=2e-4)


@pytest.mark.parametrize(
    "make, shape, labelled",
    [(lambda: models.build(Edm(), "ve", 0.5, (3, 32, 32), 10), (3, 32, 32), True),
     (lambda: models.build(Edm(preset="cifar10-ncsnpp"), "ve", 0.5, (3, 32, 32), 10), (3, 32, 32), True),
     (lambda: models.build(Edm(preset="imagenet64"), "ve", 0.5, (3, 64, 64), 1000), (3, 64, 64), True),
     (lambda: models.build(Edm2(size="S"), "ve", 0.5, (4, 64, 64), 1000), (4, 64, 64), True),
     (lambda: models.build(Dit(size="S", mlp="swiglu"), "linear", 0.5, (4, 16, 16), 10), (4, 16, 16), True),
     (lambda: LatentVgg(4, 1000, 64), (4, 64, 64), None), (PixelVgg, (3, 64, 64), None)],
)  # fmt: skip
def test_our_rules_of_shapes_count_as_torch_does(make, shape, labelled):
    """Torch's own counter, over its own fake tensors: right, and seconds slower to import."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), cmt_kernels.use("reference"), torch.no_grad():
        net, x, t = make(), torch.zeros(1, *shape), torch.ones(1)
        with FlopCounterMode(display=False) as counter:
            net.slices(x) if labelled is None else net(x, t, t, torch.zeros(1, dtype=torch.int64))
        parameters = sum(p.numel() for p in net.parameters())
    assert flops_._counted(make, shape, labelled) == (parameters, counter.get_total_flops())


# measured with the networks' own code: GFLOP of a forward, to the digits that were written down
@pytest.mark.parametrize(
    "model, shape, classes, gflop",
    [(Edm(conditional=False), (3, 32, 32), 0, 42.4), (Edm(preset="ffhq64", conditional=False), (3, 64, 64), 0, 83.7),
     (Edm2(size="M"), (4, 64, 64), 1000, 358), (Edm2(size="XXL"), (4, 64, 64), 1000, 1094)],
)  # fmt: skip
def test_a_forward_of_a_published_u_net(model, shape, classes, gflop):
    digit = 0.051 if gflop < 100 else 0.51
    assert flops_.network(model, "ve", shape, classes).flops / 1e9 == pytest.approx(gflop, abs=digit)


@pytest.mark.parametrize(
    "kind, shape, gflop, digit", [("lpips", (3, 32, 32), 0.63, 0.006), ("lpips", (3, 64, 64), 2.5, 0.051),
                                  ("latent_lpips", (4, 64, 64), 29.9, 0.051)],
)  # fmt: skip
def test_a_forward_of_a_feature_network(kind, shape, gflop, digit):
    assert flops_.feature_network(kind, shape).flops / 1e9 == pytest.approx(gflop, abs=digit)


CMT = (*TRAIN, Term("teacher", "forward", 1, ""))
GUIDED = (*CMT, Term("teacher", "forward", 1, ""))
POOLED = (*TRAIN, Term("teacher", "forward", 0.25, ""))
SELECTIVE = (*TRAIN, Term("student", "tangent", 0.25, ""))
FULL = (*TRAIN, Term("student", "tangent", 1, ""))
REUSED = (*SELECTIVE, Term("student", "forward", 1.25, ""))
JAX = (*FULL, Term("student", "forward", 2, ""))


@pytest.mark.parametrize(
    "work, at_256, at_1024",
    [(TRAIN, 712, 3147), (CMT, 949, 4196), (GUIDED, 1186, 5245), (POOLED, 771, 3409), (ECT, 949, 4196),
     (FULL, 957, 4331), (SELECTIVE, 773, 3443), (REUSED, 1070, 4755), (JAX, 1433, 6429), (MEANFLOW, 1669, 7479)],
)  # fmt: skip
def test_flops_of_a_step_of_an_xl(work, at_256, at_1024):
    for tokens, gflop in ((256, at_256), (1024, at_1024)):
        net = dit("XL", tokens)
        assert flops_.flops_image(list(work), {"student": net, "teacher": net}) / 1e9 == pytest.approx(
            gflop,
            abs=0.5 + 0.005 * net.flops / 1e9,  # the table's factors of F have two decimals
        )


def test_published_ecd_is_6_66_forwards():
    xxl, m = (flops_.network(Edm2(size=size), "ve", (4, 64, 64), 1000) for size in ("XXL", "M"))
    known = {"student": xxl, "teacher": xxl, "guide": m}
    assert flops_.flops_image(list(ECD), known) / xxl.flops == pytest.approx(6.66, abs=0.01)
    assert flops_.flops_image(list(AYF), known) < flops_.flops_image(list(ECD), known)


# us an image of FM, CMT, MeanFlow on a quarter of the rows and on all, batch 64 on one card
TABLE = {
    ("h100", "B", 256, "eager"): (522, 659, 671, 1120),
    ("h100", "B", 256, "compile"): (449, 571, 486, 596),
    ("h100", "B", 256, "fused"): (377, 493, 410, 507),
    ("h100", "B", 256, "fused+epilogues"): (359, 468, 389, 482),
    ("h100", "L", 256, "eager"): (1581, 1988, 1990, 3216),
    ("h100", "L", 256, "compile"): (1363, 1728, 1471, 1795),
    ("h100", "L", 256, "fused+epilogues"): (1101, 1432, 1193, 1469),
    ("h100", "XL", 256, "eager"): (2246, 2817, 2772, 4348),
    ("h100", "XL", 256, "compile"): (1946, 2462, 2093, 2536),
    ("h100", "XL", 256, "fused"): (1652, 2146, 1784, 2182),
    ("h100", "XL", 256, "fused+epilogues"): (1586, 2058, 1713, 2094),
    ("h100", "B", 1024, "compile"): (1915, 2469, 2094, 2631),
    ("h100", "B", 1024, "fused+epilogues"): (1631, 2135, 1786, 2252),
    ("h100", "L", 1024, "compile"): (5639, 7281, 6157, 7711),
    ("h100", "L", 1024, "fused+epilogues"): (4860, 6368, 5316, 6681),
    ("h100", "XL", 1024, "eager"): (9039, 11642, 12897, 24472),
    ("h100", "XL", 1024, "compile"): (8259, 10643, 8962, 11070),
    ("h100", "XL", 1024, "fused+epilogues"): (7223, 9430, 7843, 9703),
    ("h200", "XL", 256, "compile"): (1755, 2242, 1893, 2304),
    ("h200", "XL", 256, "fused+epilogues"): (1504, 1960, 1627, 1996),
    ("h200", "XL", 1024, "fused+epilogues"): (7018, 9160, 7622, 9433),
    ("h200", "B", 256, "fused+epilogues"): (338, 442, 368, 456),
}


@pytest.mark.parametrize("key", TABLE, ids=lambda key: "-".join(map(str, key)))
def test_predicted_times(key):
    name, size, tokens, how = key
    net = dit(size, tokens)
    for work, us in zip((TRAIN, CMT, SELECTIVE, FULL), TABLE[key]):
        assert estimate.step_us(list(work), net, CARDS[name], how, "bf16", 64) == pytest.approx(us, rel=2e-3, abs=1.1)


def test_more_cards_take_fewer_hours_and_as_many_gpu_hours_but_for_communication():
    run = loading.load("imagenet256-mf")
    rows = estimate.rows_of(run)
    bills = [estimate.stage_bill(resolve(run, "post"), rows, CARDS["h100"], n)[0] for n in (1, 2, 4, 8, 16)]
    hours = [b.hours for b in bills]
    assert hours == sorted(hours, reverse=True)
    for b, n in zip(bills, (1, 2, 4, 8, 16)):
        rest = b.gpu_hours - n * b.steps * (b.communication_us + b.optimizer_us) / 3.6e9
        assert rest == pytest.approx(b.steps * 256 * bills[0].work_us / 3.6e9)
        assert b.gpu_hours == n * b.hours
    assert bills[0].communication_us == 0 < bills[1].communication_us < bills[3].communication_us
    assert bills[3].communication_us < bills[4].communication_us  # beyond one machine


def test_communication_by_hand():
    h100, p = CARDS["h100"], 10**9
    assert step_time.communication_us(1, p, 0, h100, 8, 1) == pytest.approx(1e6 * 8e9 * 7 / 8 / 450e9)
    assert step_time.communication_us(3, p, 0, h100, 8, 2) == pytest.approx(1e6 * (4 + 16) * 1e9 * 7 / 8 / 450e9)
    assert step_time.communication_us(1, p, p, h100, 16, 1) == pytest.approx(1e6 * 12e9 * 15 / 16 / 400e9)


def test_small_calls_of_a_teacher_cost_more():
    run = loading.load("imagenet512-dit")
    rows = estimate.rows_of(run)
    known, _ = estimate.networks(resolve(run, "mid"), rows)
    us = {}
    for mode in ("pool", "paper"):
        changed = savings._with(run, ["mid"], mode=mode)
        us[mode] = estimate.stage_bill(resolve(changed, "mid"), rows, CARDS["h100"], 8)[0].work_us
    term = next(t for t in flops_.terms(resolve(run, "mid")) if t.of == "teacher")
    plain = term.times * step_time.microseconds("forward", known["teacher"], CARDS["h100"], "fused", "bf16")[0]
    # 256 rows / 8 points = 32 trajectories, 4 a card of 1024 tokens: half way, by their logarithm, from .48 to .85
    assert us["paper"] - us["pool"] == pytest.approx(plain * (0.85 / (0.48 + 0.75 * 0.37) - 1), rel=1e-6)


def test_terms_of_a_recipe_by_hand():
    run = loading.load("imagenet512-dit")
    count = lambda name, of, kind: sum(
        t.times for t in flops_.terms(resolve(run, name)) if (t.of, t.kind) == (of, kind)
    )
    # anchor on half the rows: MeanFlow's guidance on the other half, conditional calls on a quarter of that
    assert count("post", "student", "tangent") == 0.5 * 0.25
    assert count("post", "student", "forward") == 1 + 0.5 + 0.5 * 0.25
    assert count("post", "teacher", "forward") == 0.5 * 2 * 16 / 8 and count("mid", "teacher", "forward") == 2 * 16 / 8
    assert count("mid", "student", "backward") == 1 == count("mid", "student", "recompute")
    guided = loading.load("imagenet512-ecd")
    assert [(t.of, t.times) for t in flops_.terms(resolve(guided, "post")) if t.of in ("teacher", "guide")] == [
        ("teacher", 2), ("guide", 2)]  # fmt: skip
    assert sum(t.times for t in flops_.terms(resolve(guided, "mid")) if t.of == "features") == 3


def test_calls_weigh_backward_twice():
    assert flops_.calls(resolve(loading.load("digits-mf"), "pre"))["forwards"] == 3 * 153600


def test_cards_are_corrected_by_results(tmp_path):
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    net = dit("XL", 256)
    us = estimate.step_us(list(TRAIN), net, CARDS["h100"], "fused", "bf16", 64)
    row = {"objective": "FM", "precision": "bf16", "width": 1152, "depth": 28, "tokens": 256, "batch": 64}
    rows = [
        row | {"how": how, "images_per_s": 1e6 / (k * us)} for how, k in (("compiled", 2), ("eager", 3), ("peer", 1))
    ]
    about = {"device": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "date": "2027-01-01", "rows": rows}
    (folder / "step.json").write_text(json.dumps(about))
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "ops.json").write_text(json.dumps(about))
    h100 = card("h100", tmp_path)
    assert [round(s.us / us, 6) for s in h100.steps] == [2]  # ours at its fastest, not the peer
    assert h100.matmul == CARDS["h100"].matmul and card("h200", tmp_path) == CARDS["h200"]
    known = {"student": net, "teacher": net}
    same = estimate.reckon(list(TRAIN), known, 64, 64, h100, 1, Way("bf16", "fused"))
    assert same.mark == "measured: nvidia-h100-80gb-hbm3/step.json at abc1234, compiled"
    assert same.work_us == pytest.approx(
        2 * estimate.reckon(list(TRAIN), known, 64, 64, CARDS["h100"], 1, Way("bf16", "fused")).work_us
    )
    assert same.step_us / 64 == pytest.approx(2 * us)  # of the step that was measured its own time, optimizer and all
    other = estimate.reckon(list(FULL), known, 64, 64, h100, 1, Way("bf16", "fused"))
    assert other.mark.startswith("predicted, scaled by the measured")
    assert estimate.reckon(list(TRAIN), known, 64, 64, h100, 1, Way("tf32", "fused")).mark == "predicted"
    large = dit("L", 256)  # of a network that nobody has measured here, what the model missed of another
    elsewhere = estimate.reckon(
        list(TRAIN), {"student": large, "teacher": large}, 64, 64, h100, 1, Way("bf16", "fused")
    )
    plainly = estimate.reckon(
        list(TRAIN), {"student": large, "teacher": large}, 64, 64, CARDS["h100"], 1, Way("bf16", "fused")
    )
    assert elsewhere.mark.startswith("predicted, scaled by another network's measured steps of nvidia-h100")
    assert elsewhere.work_us == pytest.approx(2 * plainly.work_us)
    for rate in (9e14, {"bf16": 9e14, "fp32": 4e13}):
        (folder / "step.json").write_text(json.dumps(about | {"matmul_flop_s": rate}))
        again = card("h100", tmp_path)
        assert again.matmul["bf16"] == 9e14 and "abc1234" in again.measured["matmul bf16"]
    assert again.matmul["fp32"] == 4e13 and again.copy == 3e12


def test_a_name_that_is_no_card():
    with pytest.raises(ConfigError, match="h10'.*h100, h200, a100, rtx4090, rtx5090, cpu, laptop.*did you mean h100"):
        card("h10", None)
    with pytest.raises(ConfigError, match="'cpu' has no measurements"):
        card("cpu", None)
    assert set(CARDS) < set(NAMES)


def test_budgets_name_recipes_and_sources():
    for budget in BUDGETS:
        assert set(budget.recipes) <= set(recipes.recipes()) and "arXiv" in budget.source
        assert budget.parts or budget.hours
