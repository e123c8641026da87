"""A stage's attention on a CPU: chosen as it begins, kept in its manifest, the same when it is taken up again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cmt_kernels.attention import primal, small

from cmt_fast.cli.objectives import default
from cmt_fast.config import loading
from cmt_fast.config.schema import MeanFlow
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.objectives import OBJECTIVES, counting
from cmt_fast.run.networks import attentions
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint
from cmt_fast.train import attention_choice, loop
from tests.fixtures.tiny import metrics, stop_after_a_checkpoint, tiny

MORE = ("digits", "mid.checkpoint_every_nimg=128", "eval.n_during=50", "mid.eval_every_nimg=320")
LABEL = "T16 d8 float32"


@pytest.fixture
def fast(monkeypatch):
    """Makes `choose` answer as on a processor where the formula is the faster, or is not."""
    monkeypatch.setenv("CMT_PROCESSOR", "")

    def answer(name: str) -> None:
        monkeypatch.setattr(small, "choose", lambda *_: name)

    return answer


@pytest.fixture(scope="module")
def pre(tmp_path_factory):
    """A run whose first stage is finished, nothing having been timed."""
    folder = tmp_path_factory.mktemp("choice") / "run"
    loop.train(Workspace(tiny(*MORE), folder), ["pre"])
    return folder


def work_of(pre, out) -> Workspace:
    return Workspace(tiny(*MORE), out, pre)


def test_a_resumed_stage_keeps_the_choice_that_it_began_with(pre, tmp_path, fast) -> None:
    """On a machine that would now choose otherwise; it ends bit for bit as if it had not stopped."""
    fast(small.PLAIN)
    loop.train(work_of(pre, tmp_path / "whole"), ["mid"])
    stop_after_a_checkpoint(work_of(pre, tmp_path / "run"))
    begun = checkpoint.latest(tmp_path / "run" / "mid").manifest
    assert begun["attention"] == {LABEL: small.PLAIN} and not begun["done"]
    fast(small.SDPA)
    loop.train(work_of(pre, tmp_path / "run"), ["mid"])
    loop.train(work_of(pre, tmp_path / "other"), ["mid"])
    whole, run, other = (checkpoint.complete(tmp_path / name / "mid").manifest for name in ("whole", "run", "other"))
    assert run["files"] == whole["files"] != other["files"]  # the choice moves bits
    assert run["attention"] == whole["attention"] != other["attention"]
    assert metrics(tmp_path / "run" / "mid") == metrics(tmp_path / "whole" / "mid")
    assert small._chosen == {}


def test_a_checkpoint_that_says_nothing_goes_on_with_sdpa(pre, tmp_path, fast) -> None:
    work = work_of(pre, tmp_path / "run")
    fast(small.PLAIN)
    found = checkpoint.complete(pre / "pre")
    old = {k: v for k, v in found.manifest.items() if k != "attention"}
    assert attention_choice.settle(work, work.run.mid, found._replace(manifest=old)) == {}
    assert attention_choice.settle(work, work.run.mid, None) == {LABEL: small.PLAIN}


def test_ranks_do_as_the_first_one_found(pre, tmp_path, fast, monkeypatch) -> None:
    work, mine = work_of(pre, tmp_path / "run"), []
    monkeypatch.setattr(small, "choose", lambda *_: pytest.fail("another rank timed"))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    first = float(small.NAMES.index(small.PLAIN))
    monkeypatch.setattr(distributed, "every_rank", lambda x: mine.append(x) or [[first], x])
    assert attention_choice.settle(work, work.run.mid, None) == {LABEL: small.PLAIN} and len(mine) == 1


def test_both_dtypes_are_asked_where_both_are_used(pre, tmp_path, fast) -> None:
    fast(small.SDPA)
    run = tiny(*MORE, "mid.trajectories.precision=auto", "post.precision=bf16")
    work = Workspace(run, tmp_path / "run", pre)
    both = {LABEL: small.SDPA, "T16 d8 bfloat16": small.SDPA}
    assert attention_choice.settle(work, run.mid, None) == attention_choice.settle(work, run.post, None) == both
    assert attention_choice.settle(work, run.pre, None) == {LABEL: small.SDPA}
    work.device = torch.device("meta")
    assert attention_choice.settle(work, run.mid, None) == {}


def test_attentions_of_networks() -> None:
    edm2 = "{kind: edm2, width: 16, multipliers: [1, 2], blocks: 1, attention: [4], head: 8}"
    cases = {"model.width=16 model.heads=2": [(16, 8)], f"model={edm2}": [(16, 8)], "model.patch=4": [(4, 32)]}
    for text, want in cases.items():
        run = loading.load("digits", [text] if "{" in text else text.split())
        before = torch.random.get_rng_state()
        assert attentions(run, (1, 8, 8), 10) == want
        assert torch.equal(before, torch.random.get_rng_state())
    assert attentions(loading.load("gmm", []), (2,), 0) == []


def test_on_a_gpu_a_stage_without_tangents_takes_what_trains_fastest(pre, tmp_path, monkeypatch) -> None:
    """The card and its clock are made up; a stage whose network is given Duals keeps our kernels."""
    work = Workspace(tiny(*MORE, "mid.precision=bf16"), tmp_path / "run", pre)
    work.device = torch.device("cuda")
    monkeypatch.delenv("CMT_ATTENTION", raising=False)
    monkeypatch.setattr(attention_choice, "table", lambda device: {"attention": "triton"})
    asked = []
    monkeypatch.setattr(primal, "trained", lambda *key: asked.append(key) or "sdpa_cudnn")
    assert attention_choice.settle(work, work.run.mid, None) == {"T16 d8 bfloat16": "sdpa_cudnn"}
    assert asked == [(16, 8, torch.bfloat16, work.device)]
    dual = dataclasses.replace(work.run.mid, objective=MeanFlow())
    assert attention_choice.settle(work, dual, None) == {}
    monkeypatch.setenv("CMT_ATTENTION", "triton")
    assert attention_choice.settle(work, work.run.mid, None) == {}


def test_objectives_with_tangents_are_those_that_give_the_network_a_dual() -> None:
    """Counted over a stage: a schedule may begin without."""
    tangents = lambda kind, path: counting.work(default(kind), ProbabilityPath(path), 64).tangents
    given = {kind for kind, spec in OBJECTIVES.items() if tangents(kind, spec.path or "linear")}
    assert given == {kind for kind, spec in OBJECTIVES.items() if spec.tangents}
