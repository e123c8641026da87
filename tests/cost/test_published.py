"""Published networks: their parameter counts and costs, and what their own code gives for given weights.

published.json was written by running each project's code at a small size: the names and shapes of its state dict, inputs
and outputs. Weights and inputs are waves of their index, so both sides have the same ones (`fill`).
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmt_fast.config.schema import Dit, Edm, Edm2, Model, WideHead
from cmt_fast.convert import names
from cmt_fast.cost import flops
from cmt_fast.engine import load_named
from cmt_fast.models import build, fold
from cmt_fast.models.dit import positions

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "published.json").read_text())


def fill(name: str, shape: list[int]) -> Tensor:
    """Numbers of unit size, weights of more than one dimension scaled by their fan-in: a function of name and shape."""
    n = math.prod(shape)
    x = torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * (1 + zlib.crc32(name.encode()) % 9973 / 9973)) * 2**0.5
    x = x.view(shape)
    if name.endswith(("freqs", "phases", "input")):
        return x.float() * (3 if "freqs" in name else 1)
    return (x * (0.3 if x.ndim < 2 else (n / shape[0]) ** -0.5)).float()


def weights(case: dict) -> dict[str, Tensor]:
    """The state dict of a case: waves, and what its project computes and never learns."""
    out = {}
    for name, shape in case["tensors"].items():
        if name == "pos_embed":
            out[name] = positions(math.isqrt(shape[1]), shape[2], columns_first=True)[None]
        elif name.endswith("resample_filter"):
            taps = torch.tensor([1.0, 1.0] if shape[-1] == 2 else [1.0, 3.0, 3.0, 1.0])
            out[name] = (taps[:, None] * taps / taps.sum() ** 2).expand(shape).clone()
        else:
            out[name] = fill(name, shape)
    return out


def loaded(case: dict) -> torch.nn.Module:
    model = TypeAdapter(Model).validate_python(case["model"])
    net = build(model, case["path"], 0.5, tuple(case["x"][1:]), case["classes"])
    load_named(net, getattr(names, case["family"])(weights(case)))
    return net.eval()


def outputs(net: torch.nn.Module, case: dict) -> Tensor:
    t, r = torch.tensor(case["t"]), torch.tensor(case["r"])
    told = {"augment": torch.tensor(case["augment"])} if "augment" in case else {}
    with torch.no_grad():
        return net(fill("input", case["x"]), t, r, torch.tensor(case["labels"]), **told).flatten()[:: case["every"]]


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).double().norm() / exact.double().norm())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_outputs_are_those_of_the_projects_own_code(case):
    wanted = torch.tensor(case["y"])
    net = loaded(case)
    assert relative(outputs(net, case), wanted) < 1e-5
    assert relative(outputs(fold(net), case), wanted) < 1e-5
    if "log_variance" in case:
        u = net.net.log_variance(torch.tensor(case["t"]).log() / 4)
        assert torch.allclose(u, torch.tensor(case["log_variance"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted({c["family"] for c in CASES}))
def test_a_tensor_of_another_family_is_refused(family):
    case = next(c for c in CASES if c["family"] == family)
    with pytest.raises(ValueError, match=r"'decoder\.mid\.weight' is no tensor"):
        getattr(names, family)(weights(case) | {"decoder.mid.weight": torch.zeros(1)})


def test_what_would_not_be_the_same_network_is_refused():
    case = next(c for c in CASES if c["family"] == "sit")
    with pytest.raises(ValueError, match="pos_embed"):
        names.sit(weights(case) | {"pos_embed": torch.zeros(case["tensors"]["pos_embed"])})
    plain, ncsnpp = (weights(next(c for c in CASES if c["id"] == name)) for name in ("ddpmpp", "ncsnpp"))
    for theirs, others, taps in ((plain, ncsnpp, "1, 1"), (ncsnpp, plain, "1, 3, 3, 1")):
        (name,) = {n for n in theirs if n.endswith("filter")} & {n for n in others if ".dec.8x8_up.conv0.resample" in n}
        with pytest.raises(ValueError, match=f"{name}.*{taps} along both sides"):
            names.edm(theirs | {name: others[name]})


LIKE = "linear", (768, 16, 16), 1000
DITDH = Dit(size="XL", patch=1, embeddings="gaussian", mlp="swiglu", norm="rms", rope=True, wide_head=WideHead())
# model, shape, classes, millions of parameters
PUBLISHED = {
    "EDM2-XS": (Edm2(size="XS"), (4, 64, 64), 1000, 125),
    "EDM2-S": (Edm2(size="S"), (4, 64, 64), 1000, 280),
    "EDM2-M": (Edm2(size="M"), (4, 64, 64), 1000, 498),
    "EDM2-L": (Edm2(size="L"), (4, 64, 64), 1000, 777),
    "EDM2-XL": (Edm2(size="XL"), (4, 64, 64), 1000, 1119),
    "EDM2-XXL": (Edm2(size="XXL"), (4, 64, 64), 1000, 1523),
    "EDM CIFAR-10": (Edm(), (3, 32, 32), 0, 55.7),
    "EDM FFHQ-64": (Edm(preset="ffhq64"), (3, 64, 64), 0, 61.8),
    "EDM CIFAR-10, NCSN++": (Edm(preset="cifar10-ncsnpp"), (3, 32, 32), 0, 56.4),
    "ADM ImageNet-64": (Edm(preset="imagenet64"), (3, 64, 64), 1000, 296),
    "DiT-S/2": (Dit(size="S", embeddings="dit"), (4, 32, 32), 1000, 33),
    "DiT-B/2": (Dit(size="B", embeddings="dit"), (4, 32, 32), 1000, 130),
    "DiT-L/2": (Dit(size="L", embeddings="dit"), (4, 32, 32), 1000, 458),
    "DiT-XL/2": (Dit(size="XL", embeddings="dit"), (4, 32, 32), 1000, 675),
    "DiT^DH-XL": (DITDH, (768, 16, 16), 1000, 838.7),  # 839 with its constants, the positions
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name):
    model, shape, classes, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = build(model, "ve", 0.5, shape, classes)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count - millions) <= 0.5 if millions >= 100 else abs(count - millions) < 0.6, count


@pytest.mark.parametrize(
    "name, giga, elementwise", [("EDM2-S", 102.2, 0.015), ("EDM2-XXL", 552, 0.01), ("DiT-XL/2", 118.64, 0.001)]
)
def test_multiply_adds_as_published(name, giga, elementwise):
    """What papers call Gflops of a forward. EDM2's count every element of elementwise operations as well, ours do not."""
    model, shape, _, _ = PUBLISHED[name]
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # shapes without numbers, attention as products
        net = build(model, "ve", 0.5, shape, 1000)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.net(torch.zeros(1, *shape), torch.ones(1), None, torch.zeros(1, dtype=torch.int64))
    assert -elementwise < counter.get_total_flops() / 2e9 / giga - 1 < 0.001


def test_work_of_a_wide_head_is_counted_as_published():
    """MF-RAE's 157 G multiply-adds, which leave out those of attention: 2 T^2 D a block."""
    net, attention = flops.network(DITDH, *LIKE), 2 * 256**2 * (28 * 1152 + 2 * 2048)
    assert net.flops / 2e9 - attention / 1e9 == pytest.approx(157, abs=0.5)
    assert net.name == "DiT^DH-XL" and net.flops > 1.3 * flops.network(replace(DITDH, wide_head=None), *LIKE).flops
