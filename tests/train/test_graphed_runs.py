"""Runs whose steps are CUDA graphs, on the tape: resumed, profiled, from Python; and the key that asks for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmt_fast import api, cli
from cmt_fast.config import fingerprint
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.train import loop
from cmt_fast.train.profiler import Profile
from tests.engine.test_step_graph import PROVEN, STEPS, Training
from tests.fixtures.tape import Tape, tape
from tests.fixtures.tiny import SMALL, stop_after_a_checkpoint, tiny
from tests.train.test_resume import assert_equal_stage

__all__ = ["tape"]


def test_a_graphed_run_resumes_to_the_bits_of_an_eager_one(tape: Tape, tmp_path: Path, capsys) -> None:
    keys = ["mid.images_nimg=256", "mid.checkpoint_every_nimg=64", "mid.grid_every_nimg=96", "pre.images_nimg=64"]
    folder = lambda name, *more: Workspace(tiny("digits", *keys, *more), tmp_path / name)
    loop.train(folder("eager", "pre.cuda_graph=false", "mid.cuda_graph=false"), ["pre", "mid"])
    assert not tape.captures and "CUDA" not in capsys.readouterr().out
    loop.train(folder("whole"), ["pre", "mid"])
    assert f"     mid {PROVEN}" in capsys.readouterr().out and tape.replays > 6
    cut = folder("cut")
    loop.train(cut, ["pre"])
    stop_after_a_checkpoint(cut)
    loop.train(folder("cut"), ["mid"])
    assert "mid resumes at step 2 of 8" in capsys.readouterr().out
    for name in ("whole", "cut"):
        for stage in ("pre", "mid"):
            assert_equal_stage(tmp_path / "eager" / stage, tmp_path / name / stage)


def test_a_profiled_stage_is_eager_until_it_is_profiled(tape: Tape, tmp_path: Path, capsys) -> None:
    keys = ["pre.images_nimg=640", "model.depth=1"]
    loop.train(Workspace(tiny("digits", *keys), tmp_path / "run"), ["pre"], Profile(2))
    assert f"     pre {PROVEN}" in capsys.readouterr().out and tape.captures == 2
    text = (tmp_path / "run/pre/profile/table.md").read_text()
    assert "| forward | attention |" in text and "| backward | attention |" in text
    loop.train(Workspace(tiny("digits", *keys, "pre.cuda_graph=false"), tmp_path / "plain"), ["pre"])
    assert_equal_stage(tmp_path / "run" / "pre", tmp_path / "plain" / "pre")


def test_training_steps_of_the_api_are_graphs_too(tape: Tape, tmp_path: Path) -> None:
    found = []
    for more in ([], ["pre.cuda_graph=false"]):
        net, step = api.training_steps(Workspace(tiny("digits", "pre.micro_batch=16", *more), tmp_path), "pre")
        figures = [step() for _ in range(STEPS)]
        found.append((figures, [p.detach().clone() for p in net.parameters()]))
    (ours, p), (plain, q) = found
    assert tape.captures == 2 and ours == plain and all(map(torch.equal, p, q))


# ------------------------------------------------------------------------------------------ the key


def test_who_asks_for_a_graph_that_cannot_be_is_told(tmp_path: Path, capsys) -> None:
    """Before anything is trained, naming the key; `auto` is eager on a CPU without a word."""
    ask = ["train", "digits", *SMALL, "pre.cuda_graph=on", "--stages=pre", f"--out={tmp_path}"]
    for more, why in (([], "it needs a CUDA device, and this run's is cpu"), (["engine=zero"], "the engine is zero")):
        assert cli.main([*ask, "device=cpu", *more]) == 2
        assert f"pre.cuda_graph: the step cannot be a CUDA graph: {why}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="pre.cuda_graph: the step cannot be a CUDA graph: it needs a CUDA device"):
        api.training_steps(Workspace(tiny("digits", "pre.cuda_graph=true", "device=cpu"), tmp_path), "pre")
    t = Training("denoise")
    assert t.graph().off and not t.lines
    assert cli.main(["train", "digits", "pre.cuda_graph=maybe", "--dry-run"]) == 2
    assert "pre.cuda_graph" in capsys.readouterr().err


def test_the_key_is_no_fact_of_a_stage() -> None:
    """A stage may go on with another value: the numbers are the same."""
    runs = [tiny("digits", f"mid.cuda_graph={value}") for value in ("auto", "on", "off")]
    assert [run.mid.cuda_graph for run in runs] == ["auto", True, False]
    assert len({fingerprint.digest(run) for run in runs}) == 1
    assert len({fingerprint.stage_digest(run, "mid") for run in runs}) == 1


def test_a_rank_that_does_not_profile_waits_for_the_one_that_does(monkeypatch) -> None:
    """Else it would prove its graph, which all ranks do together, while rank 0 is eager."""
    first, asked = [1, 1, 0], []
    monkeypatch.setattr(distributed, "largest", lambda mine: asked.append(mine) or max(mine, first.pop(0)))
    waiting = loop._waiting(SimpleNamespace(running=False))
    assert [waiting() for _ in range(5)] == [True, True, False, False, False]
    assert asked == [0, 0, 0]  # nothing is asked once it is over
    assert not loop._waiting(None)()
