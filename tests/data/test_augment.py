"""EDM's augmentation: its pipe's own numbers, what it leaves alone, what its draws depend on, and that the network is told.

augment.json was written by EDM's own pipe (NVlabs/edm, training/augment.py) with the numbers of `changes` handed to it in the
place of random ones, on waves, all of a batch at once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import AUGMENTATIONS, Augment
from cmt_fast.data import augment
from cmt_fast.diffusion.rng import Random
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from tests.fixtures.tiny import source_of, tiny

PEER = json.loads((Path(__file__).parents[1] / "fixtures" / "augment.json").read_text())
OFF = dict.fromkeys(AUGMENTATIONS, 0.0)
RANDOM, IDS = Random(3, 0, 7), torch.arange(6)
EDM = "model={kind: edm, width: 8, multipliers: [1, 2], blocks: 1, attention: [4]}"


def only(*kinds: str, p: float = 1.0) -> Augment:
    return Augment(p=p, **(OFF | dict.fromkeys(kinds, 1.0)))


def waves() -> Tensor:
    """The images that EDM's pipe was given. (6, 3, 12, 12)."""
    b, c, y, x = (torch.arange(n).view(-1, *[1] * (3 - i)) for i, n in enumerate(PEER["images"]))
    return (torch.sin(0.5 * (b + 1) ** 0.5 * x + 0.3 * c + 0.2 * b) * torch.cos(0.35 * (c + 1) * y + 0.1 * b)).float()


def changes() -> augment.Changes:
    w = {k: torch.tensor(v) for k, v in PEER["changes"].items()}
    return augment.Changes(**w | {k: w[k].bool() for k in ("xflip", "yflip")})


@pytest.mark.parametrize("case", PEER["cases"], ids=lambda c: "+".join(c["kinds"]))
def test_images_and_labels_are_those_of_edms_own_pipe(case: dict) -> None:
    """Its row 0, to which nothing happens, went through its filters, ours did not."""
    config = only(*case["kinds"])
    told = augment.labels(changes(), config, tuple(PEER["images"][1:]))
    assert told.shape[1] == config.labels and torch.allclose(told, torch.tensor(case["labels"]), rtol=0, atol=1e-6)
    y = augment.apply(waves(), changes(), config).flatten()[:: case["every"]]
    assert (y - torch.tensor(case["y"])).abs().max() < 1e-5


def test_the_published_labels_are_nine_in_edms_order() -> None:
    assert Augment().labels == 9 and Augment().p == 0.12
    assert Augment().kinds == ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")


def test_a_row_to_which_nothing_happens_keeps_its_bits_and_is_told_nothing() -> None:
    images, config = waves(), Augment(p=0.0, xflip=0.0)
    drawn = augment.draw(RANDOM, IDS, config)
    assert torch.equal(augment.apply(images, drawn, config), images)
    assert not augment.labels(drawn, config, (3, 12, 12)).any()
    drawn = augment.draw(RANDOM, torch.arange(400), Augment(p=0.2, xflip=0.0, yflip=0.0))
    some = augment.apply(images[:1].expand(400, -1, -1, -1), drawn, Augment(p=0.2, xflip=0.0, yflip=0.0))
    same = (some == images[0]).flatten(1).all(1)
    told = augment.labels(drawn, Augment(p=0.2, xflip=0.0, yflip=0.0), (3, 12, 12))
    assert torch.equal(same, ~drawn.moved) and torch.equal(same, ~told.any(1)) and 100 < same.sum() < 230


def test_each_kind_happens_as_often_as_it_is_told_to() -> None:
    """Beyond 5 standard errors no share may be, nor the spread of what is drawn."""
    n, p = 40_000, 0.12
    config = Augment(p=p, rotate_int=1.0, translate_int=2.0, aniso=0.5)
    c = augment.draw(RANDOM, torch.arange(n), config)
    shares = {
        "xflip": (c.xflip, 0.5), "yflip": (c.yflip, p / 2), "turns": (c.turns != 0, p * 3 / 4),
        "whole": (c.whole[:, 0] != 0, 2 * p), "scale": (c.scale != 0, p),
        "angle": (c.angle != 0, p), "aniso": (c.aniso != 0, p / 2),
        "along": (c.along != 0, 0.5),
        "shift": (c.shift[:, 1] != 0, p), "scale and angle": ((c.scale != 0) & (c.angle != 0), p * p),
    }  # fmt: skip
    for name, (happened, share) in shares.items():
        assert abs(happened.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n), name
    for drawn, std in (
        (c.scale, 1),
        (c.aniso, 1),
        (c.shift[:, 0], 1),
        (c.angle, math.pi / 3**0.5),
        (c.whole[:, 1], 3**-0.5),
    ):
        drawn = drawn[drawn != 0]
        assert abs(drawn.std() / std - 1) < 5 / math.sqrt(2 * len(drawn))
    turned = [int((c.turns == k).sum()) for k in (1, 2, 3)]
    assert max(turned) - min(turned) < 5 * math.sqrt(2 * n * p / 4)
    assert torch.equal(augment.draw(RANDOM, torch.arange(n), Augment(p=p, scale=0.0)).angle, c.angle)


def test_a_row_depends_on_its_own_draw_alone(monkeypatch) -> None:
    """Other rows, ranks and how many are computed together change no bit; seed, stage and step change the row."""
    images, config = waves(), only(*AUGMENTATIONS)
    give = lambda random, rows: augment.apply(images[rows], augment.draw(random, IDS[rows], config), config)
    whole = give(RANDOM, slice(None))
    assert torch.equal(
        torch.stack((give(RANDOM, slice(0, None, 2)), give(RANDOM, slice(1, None, 2))), 1).flatten(0, 1), whole
    )
    monkeypatch.setattr(augment, "TOGETHER", 1)
    assert torch.equal(give(RANDOM, slice(None)), whole)
    for other in (RANDOM._replace(seed=4), RANDOM._replace(stage=1), RANDOM._replace(step=8)):
        assert not torch.isclose(give(other, slice(None)), whole, atol=1e-3).flatten(1).all(1).any()


def test_a_stage_gives_its_network_what_was_done_and_ranks_share_the_same(tmp_path, monkeypatch) -> None:
    run = tiny("digits", EDM, "pre.augment={p: 0.5}", "pre.batch=8")
    source, plain = (source_of(Workspace(r, tmp_path), "pre") for r in (run, tiny("digits", EDM, "pre.batch=8")))
    drawn, bare = source.draw(2), plain.draw(2)
    assert bare.told is None and drawn.told.shape == (8, 9) and torch.equal(drawn.own.t, bare.own.t)
    changed = (drawn.own.x_0 != bare.own.x_0).flatten(1).any(1)
    assert changed[drawn.told[:, 1:].any(1)].all() and not changed[~drawn.told.any(1)].any()
    heard = []
    engine = lambda x, *args, **named: heard.append(named["augment"]) or torch.zeros_like(x)
    engine.wide = None
    source.loss_of(engine, drawn)
    assert len(heard) == 1 and torch.equal(heard[0], drawn.told)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = source_of(Workspace(run, tmp_path), "pre").draw(2)
        assert torch.equal(mine.own.x_0, drawn.own.x_0[rank::2]) and torch.equal(mine.told, drawn.told[rank::2])


def test_what_was_done_reaches_the_output_and_its_weights_learn(tmp_path) -> None:
    from cmt_fast.engine import LocalEngine

    for path, recipe in (("ve", "digits"), ("linear", "digits-mf")):
        work = Workspace(tiny(recipe, EDM, "pre.augment={p: 0.5}", "pre.batch=8"), tmp_path / path)
        torch.manual_seed(0)
        net = work.build()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        engine = LocalEngine(net, work.run.stages["pre"], work.device)
        x, t, told = (
            torch.randn(3, 1, 8, 8),
            torch.tensor([0.3, 0.5, 0.9]),
            torch.tensor([[0.0] * 9, [1.0] * 9, [0.5] * 9]),
        )
        y, y_told = engine(x, t), engine(x, t, augment=told)
        assert torch.equal(engine(x, t, augment=torch.zeros(3, 9)), y) and torch.allclose(y_told[0], y[0], atol=1e-6)
        assert ((y_told - y)[1:].flatten(1).norm(dim=1) > 1e-4).all()
        (grad,) = torch.autograd.grad(y_told.square().sum(), [net.net.augment.weight])
        assert (grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["post.augment={}", EDM], "post.augment: is for a diffusion model's images, and post trains 'ect'; valid are stages"),
        (["pre.augment={}"], "pre.augment: tells the network 9 labels (xflip, yflip, scale, rotate_frac, aniso, translate_frac), "
                             "and this run's dit is told 0; a model of kind edm can be told"),
        (["pre.augment={rotate_int: 1}", EDM], "and this run's edm is told 9; take model.augment=11"),
        (["pre.augment={" + ", ".join(f"{k}: 0" for k in AUGMENTATIONS) + "}", EDM], "pre.augment: every kind is 0; give one of"),
        (["pre.augment={p: 1.2}", EDM], "pre.augment.p: 1.2 is not valid"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(overrides: list[str], said: str, tmp_path) -> None:
    with pytest.raises(ConfigError) as caught:
        Workspace(tiny("digits", *overrides), tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_points_of_a_plane_are_refused(tmp_path) -> None:
    from cmt_fast.config import loading

    with pytest.raises(
        ConfigError,
        match=r"pre.augment: needs images of 1 or 3 channels, the data has the shape \(2,\); set it to null",
    ):
        Workspace(loading.load("gmm", ["pre.augment={}"]), tmp_path)
