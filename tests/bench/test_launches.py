"""The counter of launches: what it counts of a network small enough to be counted by hand, and what changes a count."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import torch
from cmt_kernels import Dual, available, gelu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.__main__ import main
from bench.training import launches, runs, unet_launches, unets
from bench.training.launch_trace import Sizes, Trace, stored_bytes
from cmt_fast.models import dit
from cmt_fast.models.layers import Linear

pytestmark = pytest.mark.skipif("native" not in available("gelu", "cpu"), reason="the native ops are not built")
B, T, D, E = 6, 5, 24, 40
card = launches.hardware.CARDS["h100"]


class Perceptron(nn.Module):
    """A linear layer, gelu, a linear layer; planted: its input goes to float32 once more in between."""

    def __init__(self, planted: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.planted = Linear(D, E), Linear(E, D), planted

    def forward(self, x):
        h = gelu(self.one(x))
        return self.two(h.float() if self.planted else h)


def traced(planted: bool = False) -> Trace:
    """One step of it under autocast, with gradients that are there already, as the engine's are."""
    with FakeTensorMode():
        net = Perceptron(planted)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x, target = torch.randn(B, T, D), torch.randn(B, T, D)
        trace = Trace(Sizes.of(net, B, 0, T))
        with launches.as_on_a_gpu(trace), trace:
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            trace.part = "loss"
            loss = (y.float() - target).square().sum()
            trace.part = "backward"
            loss.backward()
    return trace


def counts(trace: Trace) -> Counter:
    return Counter((launch.part, launch.kind, launch.what) for launch in trace.launches)


def test_a_perceptron_is_counted_as_by_hand():
    forward = {
        ("forward", "cast down", "activations"): 1,  # x; gelu's result is bf16 already
        ("forward", "cast down", "weights"): 2,
        ("forward", "cast down", "biases"): 2,
        ("forward", "matmul", "activations"): 2,  # each with its bias
        ("forward", "gelu", "activations"): 1,
    }
    loss = {
        ("loss", "cast up", "activations"): 1,
        ("loss", "other", "activations"): 2,  # y - target, its square
        ("loss", "reduction", "other"): 1,
    }
    backward = {
        ("backward", "fill", "other"): 1,  # dloss = 1
        ("backward", "other", "activations"): 3,  # the square: 2 y, times the gradient (pow, mul, mul)
        ("backward", "cast down", "activations"): 1,  # dy
        ("backward", "matmul", "activations"): 1,  # to gelu's result; x needs none
        ("backward", "matmul", "weights"): 2,
        ("backward", "reduction", "biases"): 2,
        ("backward", "gelu_backward", "activations"): 1,
        ("backward", "cast up", "weights"): 2,  # bf16 gradients to fp32 ones
        ("backward", "cast up", "biases"): 2,
        ("backward", "add", "weights"): 2,  # to the gradient that is there
        ("backward", "add", "biases"): 2,
    }
    seen = counts(traced())
    assert seen == forward | loss | backward


def test_a_planted_cast_is_one_more_up_and_one_more_down():
    """h.float() before a linear layer: up, which autocast takes down again; backward the same two."""
    more = counts(traced(planted=True)) - counts(traced())
    up, down = (("cast up", "activations"), ("cast down", "activations"))
    assert more == {(part, *kind): 1 for part in ("forward", "backward") for kind in (up, down)}


def test_bytes_and_flops_are_those_of_the_tensors():
    rows = {(r.part, r.kind, r.op, r.what): r for r in traced().launches}
    cast = rows["forward", "cast down", "_to_copy", "activations"]
    assert cast.nbytes == B * T * D * (4 + 2) and cast.dtypes == "float32->bfloat16" and cast.flops == 0
    product = next(r for r in traced().launches if r.kind == "matmul")
    assert product.flops == 2 * B * T * D * E
    assert product.nbytes == 2 * (B * T * D + D * E + E + B * T * E)
    assert rows["forward", "gelu", "gelu", "activations"].nbytes == 2 * 2 * B * T * E
    assert stored_bytes(torch.empty(3, 1, dtype=torch.bfloat16).expand(3, 100)) == 6


def test_views_and_empty_tensors_launch_nothing():
    trace = Trace(Sizes.of(nn.Linear(2, 2), 1, 0, 1))
    with trace:
        x = torch.empty(4, 6)
        x.view(24)[2:].unsqueeze(0).expand(3, 22).detach()
        torch.zeros(0, 5)
    assert not trace.launches and trace.unlaunched >= 6
    with trace:
        x.t().contiguous()
    assert [(r.kind, r.nbytes) for r in trace.launches] == [("copy", 2 * 96)]


def test_rows_with_a_tangent_are_kernels_of_their_own():
    """A block: its norms and its attention launch twice where some rows have a tangent and others have none."""
    seen = {}
    for objective in ("FM", "MF"):
        trace = launches.count(objective, runs.model("dry", 16), "bf16")
        kernels: Counter = Counter()
        for r in trace.launches:
            kernels[r.kind] += r.kernels
        seen[objective] = kernels
    layers = runs.model("dry").depth
    for objective, times in (("FM", 1), ("MF", 2)):
        assert seen[objective]["attention"] == times * layers
        assert seen[objective]["modulated_norm"] == times * (2 * layers + 1)
        assert seen[objective]["attention_backward"] == 2 * layers
        assert seen[objective]["modulated_norm_backward"] == 2 * (2 * layers + 1)


def test_the_time_of_a_launch_is_the_slower_of_bytes_and_products():
    launch = launches.Launch("forward", "matmul", "mm", "activations", "bfloat16->bfloat16", 1, 0, 0)
    assert launches.predicted_ms(launch._replace(nbytes=3 * 10**9), card) == pytest.approx(3e12 / card.copy)
    rates = {"bfloat16->bfloat16": card.matmul["bf16"], "float32->float32": card.matmul["fp32"]}
    for dtypes, rate in rates.items():
        assert launches.predicted_ms(launch._replace(flops=10**12, dtypes=dtypes), card) == pytest.approx(1e15 / rate)


def test_the_command_writes_counts_and_compares_them(tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    options = ["--model", "dry", "--batch", "16", "--objective", "MF"]
    monkeypatch.setattr(sys, "argv", ["bench", "launches", *options, "--json", str(first)])
    assert main() == 0
    written = json.loads(first.read_text())
    (step,) = written["steps"]
    assert written["predicted"] is True and step["launches"] == sum(r["launches"] for r in step["rows"])
    capsys.readouterr()
    block = dit.Block.forward
    monkeypatch.setattr(dit.Block, "forward", lambda self, x, *rest: block(self, planted(x), *rest))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(second), "--against", str(first)])
    assert main() == 0
    lines = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}
    after, before = int(lines["cast up"][0]), int(lines["cast up"][3])
    assert after == before + 2  # up again, of the value and of its gradient


def planted(x: Dual) -> Dual:
    """A stream whose value goes to bfloat16 and back before every block."""
    return Dual(x.value.bfloat16().float(), x.tangent)


def test_an_edm2_s_step_is_counted_with_kernels_and_without():
    """The products are the same; between them kernels read and write less, in fewer launches."""
    for objective, part in (("CMT-CM", "forward"), ("ECD", "teacher")):
        m = unets.unet("dry", 2)
        torch_s, ours = (unet_launches.result(objective, m, card, plain) for plain in (unet_launches.PLAIN, ()))
        assert torch_s["products_ms"] == ours["products_ms"] > 0 and ours["parts_ms"][part] > 0
        assert ours["launches"] < 0.75 * torch_s["launches"] and ours["bytes"] < torch_s["bytes"]
        kinds = {row["kind"] for row in ours["rows"]}
        assert {*unet_launches.PLAIN, "convolution", "attention"} <= kinds
        assert ours["ratio"] == pytest.approx(ours["predicted_gpu_ms"] / ours["products_ms"])


def test_products_in_tf32_are_predicted_at_its_rate():
    launch = launches.Launch("forward", "convolution", "convolution", "activations", "float32->float32", 1, 0, 10**12)
    assert launches.predicted_ms(launch, card, "tf32") == pytest.approx(1e15 / card.matmul["tf32"])
