"""What the shelf says of every objective: its equation, its counted work, what prepares it and which pairs of nodes that is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cmt_fast.cli.objectives import default
from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import CmtCm, CmtMf, Ecd, MeanFlow, Sct
from cmt_fast.evaluation.rest import LINEAR, VE
from cmt_fast.objectives import OBJECTIVES, mid
from cmt_fast.objectives.counting import work
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace

UNIFORM = tuple(1 - i / 16 for i in range(17))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_says_what_it_is(kind: str) -> None:
    spec, config = OBJECTIVES[kind], default(kind)
    assert re.match(r"[A-Za-z_]+ ?=", spec.equation) and "Returns" not in spec.equation, spec.equation
    assert re.search(r"\d{4}", spec.paper) and spec.title
    assert config.asks in mid.__doc__ or config.asks == "instant"
    path = LINEAR if spec.path in (None, "linear") else VE
    assert (work(config, path, 64).tangents > 0) == spec.tangents


def test_work_is_counted() -> None:
    """By hand: guided MeanFlow calls the null class on all rows and the class on those with tangents; Heun is two calls."""
    assert work(MeanFlow(ratio=0.25), LINEAR, 64) == (1, 0, 0.25, 0)
    assert work(MeanFlow(ratio=0.25, omega=2.0, kappa=0.5), LINEAR, 64) == (1, 1.25, 0.25, 0)
    assert (
        work(Ecd(step="heun", distance="lpips"), VE, 8) == (1, 1, 0, 2) and work(Ecd(step="euler"), VE, 8).teacher == 1
    )
    assert work(Sct(), VE, 8).forwards == 4


def test_mid_training_is_read_off_the_objective() -> None:
    assert mid.prepares(default("ect"), "ve") == CmtCm() and mid.prepares(default("meanflow"), "linear") == CmtMf()
    with pytest.raises(ConfigError, match="not for the path 've'"):
        mid.prepares(default("meanflow"), "ve")


@pytest.mark.parametrize("asked, n", [("any", 16 * 17 // 2), ("end", 16), ("halves", 16 + 15 + 13 + 9 + 1)])
def test_pairs_of_nodes(asked: str, n: int) -> None:
    i, j = mid.pairs(UNIFORM, asked)
    t = torch.tensor(UNIFORM)
    assert len(i) == n and bool((i < j).all())
    spans = {float(s) for s in t[i] - t[j]}
    assert spans == ({2.0**-k for k in range(5)} if asked == "halves" else {k / 16 for k in range(1, 17)})


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no two of the times .* differ by a power of 1/2"):
        mid.pairs((0.9, 0.6, 0.3), "halves")


def test_a_stage_that_was_asked_about_other_pairs_is_another_stage() -> None:
    """Pairs change the weights, though post-training, which asks for them, is no ancestor of mid-training."""
    run = lambda pairs: loading.load("digits-mf", [f"mid.trajectories.pairs={pairs}"])
    digests = {pairs: fingerprint.stage_digest(run(pairs), "mid") for pairs in ("auto", "any", "end", "halves")}
    assert len(set(digests.values())) == 4 and run("auto").asked("mid") == "any"
    assert resolve(run("end"), "mid").run.asked("mid") == "end" and run("end").asked("post") == "any"
    assert loading.load("digits").asked("mid") == "end"


def test_pairs_that_a_consistency_function_does_not_know_are_refused() -> None:
    work = lambda pairs: Workspace(loading.load("digits", [f"mid.trajectories.pairs={pairs}"]), Path("nowhere"))
    assert work("end").run.asked("mid") == "end"
    with pytest.raises(ConfigError, match="mid.trajectories.pairs: 'halves' on the path 've'.*valid are auto, end"):
        work("halves")
