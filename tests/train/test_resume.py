"""A killed run that is started again ends bit-equal to one that was left alone: weights, every EMA, moments, metrics."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cmt_fast.config import loading
from cmt_fast.config.schema import STAGES
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime.signals import Stopped
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from tests.fixtures import forked
from tests.fixtures.tiny import metrics, tiny

# of a stage; `python -m bench kills` sends a hundred; of four, two fall between its steps, one while a checkpoint is written
KILLS = 8
SOON_S = 0.25  # a kill comes after so much training at most, unless that brings too few new checkpoints
LONG = [
    *(f"{s}.images_nimg={32 * 128}" for s in ("pre", "mid", "post", "control")),
    *(f"{s}.checkpoint_every_nimg={32 * 8}" for s in ("pre", "mid", "post", "control")),
    "pre.ema=[{kind: constant, beta: 0.99}, {kind: power, sigma_rel: 0.1}]",
    "mid.eval_every_nimg=2000",
    "eval.n_during=50",
]


def assert_equal_stage(a: Path, b: Path) -> None:
    """Two finished stage folders hold the same bits."""
    one, two = checkpoint.complete(a), checkpoint.complete(b)
    assert one.manifest["step"] == two.manifest["step"]
    assert one.manifest["files"].keys() == two.manifest["files"].keys()
    for name in one.manifest["files"]:
        x, y = (c.tensors(name.removesuffix(".safetensors")) for c in (one, two))
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), (name, key)
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """One run from start to end in one process, one thread as in the killed ones."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loop.train(Workspace(tiny("digits", *LONG), out), list(STAGES))
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_at_random_moments(stage, undisturbed, tmp_path):
    run, out = tiny("digits", *LONG), tmp_path / "run"
    for parent in STAGES[: STAGES.index(stage)]:
        shutil.copytree(undisturbed / parent, out / parent)
    (tmp_path / "config.json").write_text(json.dumps(loading.dump(run)))
    server = subprocess.Popen(
        [
            *forked.python(),
            str(Path(__file__).parents[1] / "fixtures" / "kill_server.py"),
            str(tmp_path / "config.json"),
            str(out),
            stage,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin and server.stdout and server.stdout.readline().strip() == "ready"

    def ask(line: str) -> str:
        server.stdin.write(line + "\n")
        server.stdin.flush()
        return server.stdout.readline().strip()

    dice, reached, forward, killed = random.Random(f"kill {stage}"), 0, 0, 0
    longest = SOON_S
    while killed < KILLS or forward < KILLS // 4:
        assert killed < 4 * KILLS, f"{forward} of {killed} kills came after a new checkpoint"
        early, writing = (
            killed % 4 == 3,
            killed % 4 == 1,
        )  # while it starts, or goes on from its checkpoint; while it saves
        after = f"writing {dice.uniform(0, 0.01):.4f}" if writing else f"begun {dice.uniform(0, longest):.4f}"
        answer = ask(f"{dice.uniform(0.01, 0.3):.4f}" if early else after)
        if answer == "done" and longest > SOON_S:  # the machine is fast again: begin again too
            assert_equal_stage(out / stage, undisturbed / stage)
            shutil.rmtree(out / stage)
            reached, longest = 0, SOON_S
            continue
        assert answer == "killed", f"after {killed} kills: {answer}"
        killed += 1
        before, reached = reached, max(checkpoint.steps(out / stage), default=0)
        forward += reached > before
        longest *= 1.2 if killed > KILLS else 1.0  # a machine on which too few of them brought a new checkpoint
        if reached > 64:  # near the end: begin again, so that every kill falls into training
            shutil.rmtree(out / stage)
            reached = 0
    assert ask("end") == "done"
    server.stdin.close()
    server.wait()
    assert_equal_stage(out / stage, undisturbed / stage)


def test_two_runs_are_equal_and_seeds_differ(tmp_path):
    for name, more in (("a", []), ("b", []), ("c", ["seed=1"])):
        stages = ["pre", "mid", "post"] if name != "c" else ["pre"]
        loop.train(Workspace(tiny("digits-mf", *more), tmp_path / name), stages)
    for stage in ("pre", "mid", "post"):
        assert_equal_stage(tmp_path / "a" / stage, tmp_path / "b" / stage)
    assert metrics(tmp_path / "a" / "pre") != metrics(tmp_path / "c" / "pre")


def test_finished_stages_are_passed_over(tmp_path):
    work = Workspace(tiny(), tmp_path)
    loop.train(work, ["pre"])
    before = (tmp_path / "pre" / "metrics.jsonl").stat().st_mtime_ns
    loop.train(work, ["pre"])
    assert (tmp_path / "pre" / "metrics.jsonl").stat().st_mtime_ns == before


def test_lineage_names_the_parent(tmp_path):
    loop.train(Workspace(tiny(), tmp_path), ["pre", "mid", "post", "control"])
    manifests = {s: checkpoint.complete(tmp_path / s).manifest for s in STAGES}
    for child, parent in (("mid", "pre"), ("post", "mid"), ("control", "pre")):
        lineage = manifests[child]["parent"]
        assert lineage["stage"] == parent
        assert lineage["ema"] == manifests[parent]["files"]["ema-0.safetensors"]["xxh3_128"]
    assert manifests["post"]["parent"]["parent"]["stage"] == "pre"


def test_who_stops_does_not_wait_for_an_evaluation(tmp_path, monkeypatch, capsys):
    """A stop at a row whose evaluation is due saves first; the resumed run makes up for it and ends with the same metrics."""
    run = tiny("digits", "pre.images_nimg=256", "pre.eval_every_nimg=32", "pre.grid_every_nimg=32")
    whole, out = Workspace(run, tmp_path / "whole"), Workspace(run, tmp_path / "run")
    loop.train(whole, ["pre"])
    looks, look = [], loop.monitor.observe
    monkeypatch.setattr(loop.monitor, "observe", lambda *given: looks.append(given[3]) or look(*given))
    with monkeypatch.context() as asked:
        asked.setattr(loop, "noted", lambda: contextlib.nullcontext([15]))
        with pytest.raises(Stopped) as stopped:
            loop.train(out, ["pre"])
    manifest = checkpoint.latest(tmp_path / "run" / "pre").manifest
    assert stopped.value.code == 143 and manifest["step"] == 1 and manifest["unseen"] and looks == []
    assert [row["kind"] for row in metrics(tmp_path / "run" / "pre")] == ["train"]
    capsys.readouterr()
    loop.train(out, ["pre"])
    assert "pre resumes at step 1 of 8 (32 images)" in capsys.readouterr().out
    assert looks[0] == 1 and looks == sorted(set(looks))
    assert_equal_stage(tmp_path / "whole" / "pre", tmp_path / "run" / "pre")
    grids = [sorted(p.name for p in (tmp_path / name / "pre" / "grids").iterdir()) for name in ("whole", "run")]
    assert grids[0] == grids[1] and len(grids[0]) == 8
