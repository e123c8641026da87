"""Stages in 16 bits as they are trained: what is measured at their start, refused, kept and gone on with."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cmt_kernels import _op

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine import LocalEngine, scaling
from cmt_fast.objectives import rounding
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from tests.fixtures.tiny import metrics, stop_after_a_checkpoint, tiny
from tests.train.test_resume import assert_equal_stage

BF16 = ["post.precision=bf16", "post.checkpoint_every_nimg=128", "post.images_nimg=384", "post.objective.doublings=1"]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run whose pre- and mid-training are finished."""
    folder = tmp_path_factory.mktemp("rounding") / "run"
    loop.train(Workspace(tiny("digits"), folder), ["pre", "mid"])
    return folder


def test_a_precision_that_resolves_no_row_is_refused_with_what_to_take(parents, tmp_path):
    work = Workspace(tiny("digits", *BF16, "post.rounding_limit=1e-6"), tmp_path / "run", parents)
    with pytest.raises(ConfigError) as error:
        loop.train(work, ["post"])
    text = str(error.value)
    assert text.startswith("post.precision: 'bf16' rounds off ") and "\n" not in text
    best, worst = float(text.split("rounds off ")[1].split()[0]), float(text.split("and ")[1].split()[0])
    assert worst > best > 1e-6 and "rounding_limit is 1e-06; take 'tf32' or 'fp32'" in text
    assert not checkpoint.steps(tmp_path / "run" / "post")


def test_a_resumed_stage_computes_the_same_rows_in_fp32(parents, tmp_path, monkeypatch, capsys):
    """What it begins with is in its checkpoints, and the machine that goes on measures nothing."""
    work = lambda out: Workspace(tiny("digits", *BF16), tmp_path / out, parents)
    calls, real = [], LocalEngine.wide
    monkeypatch.setattr(LocalEngine, "wide", lambda self, x, *a: calls.append(len(x)) or real(self, x, *a))
    loop.train(work("whole"), ["post"])
    assert "bf16 rounds" in capsys.readouterr().out
    kept = checkpoint.latest(tmp_path / "whole" / "post").manifest["rounding"]
    found = rounding.Rounding.of(json.loads(json.dumps(kept)))
    wide = [found.wide(k, 8) for k in (0, 1)]
    assert max(wide) > 0 and calls[-1] == wide[1]  # some rows are beyond it, so there is something to keep
    stop_after_a_checkpoint(work("run"), "post")
    monkeypatch.setattr(rounding, "measure", None)
    loop.train(work("run"), ["post"])
    assert_equal_stage(tmp_path / "whole" / "post", tmp_path / "run" / "post")


def test_fp16_skips_steps_that_overflow_counts_them_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "FIRST", 2.0**13)
    monkeypatch.setattr(scaling, "GROWTH", 3)
    settings = ["pre.precision=fp16", "pre.checkpoint_every_nimg=128", "pre.images_nimg=512"]
    work = lambda out: Workspace(tiny("digits", *settings), tmp_path / out)
    loop.train(work("whole"), ["pre"])
    rows = [row for row in metrics(tmp_path / "whole" / "pre") if row["kind"] == "train"]
    skipped, scales = ([row[key] for row in rows] for key in ("skipped_steps", "loss_scale"))
    assert 0 < skipped[-1] < len(rows) and skipped == sorted(skipped)
    assert min(scales) < 2.0**13 and any(b > a for a, b in zip(scales, scales[1:]))  # halved, and doubled again
    assert [row["grad_norm"] == 0 for row in rows] == [b > a for a, b in zip([0, *skipped], skipped)]
    stop_after_a_checkpoint(work("run"), "pre")
    monkeypatch.setattr(scaling, "FIRST", 1.0)
    loop.train(work("run"), ["pre"])
    assert_equal_stage(tmp_path / "whole" / "pre", tmp_path / "run" / "pre")


def test_rows_in_fp32_are_computed_again_by_the_ops_that_computed_them(tmp_path):
    """fp16 takes the reference of every op, in the forward pass as in the backward pass of activations that are not kept."""
    work = Workspace(tiny("digits", "model.checkpoint_activations=true", "post.precision=fp16"), tmp_path)
    stage, net = work.run.post, work.build()
    engine, used = LocalEngine(net, stage, torch.device("cpu")), set()
    first = next(m for m in net.modules() if hasattr(m, "blocks")).blocks[0]
    first.register_forward_pre_hook(lambda *_: used.add(_op.backend("modulated_norm").__module__))
    x, labels = torch.randn(4, *work.data.shape), torch.arange(4)
    engine.backward(engine.wide(x, torch.ones(4), None, labels, None).square().mean())
    assert used == {"cmt_kernels.modulated_norm.reference"} and torch.isfinite(engine.g).all()


def test_a_skipped_step_changes_the_scale_and_nothing_else(monkeypatch):
    stage = tiny("digits", "pre.precision=fp16").pre
    engine = LocalEngine(torch.nn.Linear(4, 3), stage, torch.device("cpu"))
    take = lambda loss: (engine.backward(loss), float(engine.step(0.1)))[1]
    x = torch.ones(2, 4)
    assert take(1e-3 * engine(x).float().square().sum()) > 0
    before = {name: {k: t.clone() for k, t in part.items()} for name, part in engine.state().items()}
    overflown = lambda y: (y.register_hook(lambda g: g * torch.inf), y.sum())[1]
    assert take(overflown(engine(x).float())) == 0.0
    after = {name: dict(part) for name, part in engine.state().items()}
    assert after["optimizer"].pop("loss_scale").tolist() == [scaling.FIRST / 2, 0, 1]
    before["optimizer"].pop("loss_scale")
    for name, part in before.items():
        assert all(torch.equal(t, after[name][k]) for k, t in part.items()), name
    for unscalable in (lambda: engine(x).float().sum() * torch.inf, lambda: overflown(engine(x).float())):
        assert math.isnan(take(unscalable()))  # a loss that is not finite, and a gradient at the least scale
        engine.skip(engine.step_count)
        engine.scale.scale.fill_(scaling.LEAST)
    assert engine.scale.skipped == 1 and engine.skipped == 2


def test_fp16_under_zero_is_refused_in_one_line(tmp_path):
    work = Workspace(tiny("digits", "pre.precision=fp16", "engine=zero"), tmp_path)
    with pytest.raises(ConfigError, match="pre.precision: 'fp16' scales its loss, which only the engine 'local' does"):
        work.sharding_plan(work.stage("pre"))
