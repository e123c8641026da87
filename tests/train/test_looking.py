"""Looks at a stage while it trains: what fails in one costs no step, a checkpoint by time costs no bit."""

from __future__ import annotations

import errno
import json

import pytest

from cmt_fast import cli
from cmt_fast.config.errors import ConfigError
from cmt_fast.report import events
from cmt_fast.run import standing
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import exits
from cmt_fast.storage import checkpoint
from cmt_fast.train import looking, loop, monitor
from tests.fixtures import small
from tests.fixtures.tiny import metrics, tiny
from tests.train.test_resume import assert_equal_stage

SHORT = ["pre.images_nimg=128", "pre.eval_every_nimg=64", "pre.grid_every_nimg=64", "eval.n_during=20"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run none of whose looks fails."""
    out = tmp_path_factory.mktemp("looking") / "whole"
    loop.train(Workspace(tiny("digits", *SHORT), out), ["pre"])
    return out / "pre"


def test_the_checkpoint_is_on_disk_before_a_look(tmp_path, monkeypatch, whole):
    seen, observe = [], monitor.observe

    def look(*given):
        manifest = checkpoint.latest(tmp_path / "pre").manifest
        seen.append((given[3], manifest["step"], manifest["unseen"], manifest["done"]))
        observe(*given)

    monkeypatch.setattr(loop.monitor, "observe", look)
    loop.train(Workspace(tiny("digits", *SHORT), tmp_path), ["pre"])
    assert seen == [(2, 2, True, False), (4, 4, True, True)]


@pytest.mark.parametrize("at, last", [(2, False), (4, True)])
def test_a_kill_within_a_look_costs_no_step_and_the_look_is_made_up_for_once(tmp_path, monkeypatch, whole, at, last):
    class Killed(BaseException):
        """As SIGKILL: nothing handles it."""

    looks, observe = [], monitor.observe

    def look(*given):
        looks.append((given[3], given[4]))
        if given[3] == at and looks.count((at, last)) == 1:
            raise Killed
        observe(*given)

    monkeypatch.setattr(loop.monitor, "observe", look)
    work = Workspace(tiny("digits", *SHORT), tmp_path)
    with pytest.raises(Killed):
        loop.train(work, ["pre"])
    assert checkpoint.latest(tmp_path / "pre").manifest["step"] == at
    loop.train(work, ["pre"])
    assert looks == [*[(2, False)] * (1 + (at == 2)), *[(4, True)] * (1 + (at == 4))]
    assert_equal_stage(whole, tmp_path / "pre")
    loop.train(work, ["pre"])
    assert len(looks) == 3  # nothing is owed any more


def test_an_evaluation_and_a_grid_that_fail_are_rows_and_training_goes_on(tmp_path, monkeypatch, capsys, whole):
    def full(*_):
        raise RuntimeError("5 channels\nare too many")

    run = tiny("digits", *SHORT)
    with monkeypatch.context() as broken:
        broken.setattr(monitor, "_evaluate", full)
        broken.setattr(monitor, "draw_grid", full)
        loop.train(Workspace(run, tmp_path), ["pre"])
    rows = [row for row in metrics(tmp_path / "pre") if row["kind"] == "failed"]
    assert [(row["step"], row["what"]) for row in rows] == [
        (n, what) for n in (2, 4) for what in ("the evaluation", "the grid")
    ]
    assert {row["error"] for row in rows} == {"5 channels are too many"}
    said = capsys.readouterr().err
    assert said.count("failed (5 channels are too many); training goes on (eval.on_error: continue)") == 4
    trained = [row for row in metrics(tmp_path / "pre") if row["kind"] == "train"]
    assert trained == [row for row in metrics(whole) if row["kind"] == "train"]
    told = events.table({"pre": standing.of(run, tmp_path, None, "pre")})
    assert [row[3] for row in told.rows] == ["evaluation failed", "grid failed"] * 2
    loop.train(Workspace(run, tmp_path), ["pre"])  # the last look is still owed, and can be had now
    assert [row["kind"] for row in metrics(tmp_path / "pre")][-2:] == ["train", "eval"]


def test_a_look_that_fails_stops_where_that_is_asked_for_and_loses_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError("eval.weights: is gone")

    monkeypatch.setattr(monitor, "_evaluate", refuse)
    with pytest.raises(ConfigError, match="is gone"):
        loop.train(Workspace(tiny("digits", *SHORT, "eval.on_error=stop"), tmp_path), ["pre"])
    manifest = checkpoint.latest(tmp_path / "pre").manifest
    assert manifest["step"] == 2 and manifest["unseen"]
    assert metrics(tmp_path / "pre")[-1]["what"] == "the evaluation"


def test_a_picture_that_finds_no_room_is_no_full_disk_to_a_scheduler(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "grid.png")

    file = small.recipe(tmp_path, small.SIT, channels=3)
    monkeypatch.setattr(monitor, "draw_grid", full)
    asked = ["train", str(file), "--out", str(tmp_path / "run"), "--stages", "pre", "eval.on_error=stop"]
    assert cli.main(asked) == exits.FAILED
    said = capsys.readouterr().err
    assert "cmt: the grid of pre: [Errno 28] No space left" in said and "Traceback" not in said


def test_checkpoints_by_time_change_no_bit(tmp_path, monkeypatch, whole):
    now, saves, save = [0.0], [], checkpoint.save
    monkeypatch.setattr(looking.time, "monotonic", lambda: now[0])

    class Clock(looking.Clock):
        def __init__(self, every_s):
            super().__init__(every_s, lambda: now[0])

        def overdue(self):
            now[0] += 0.4  # a look for what is due, at every step here
            return super().overdue()

    monkeypatch.setattr(looking, "Clock", Clock)
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, step, *a, **k: saves.append(step) or save(folder, step, *a, **k)
    )
    run = tiny("digits", *SHORT, "pre.images_nimg=128", "pre.checkpoint_every_s=0.7", "pre.eval_every_nimg=null",
               "pre.grid_every_nimg=null", "pre.checkpoint_every_nimg=12800")  # fmt: skip
    loop.train(Workspace(run, tmp_path / "timed"), ["pre"])
    assert saves == [2, 4]
    for key in ("model", "ema-0", "optimizer"):
        one, two = (checkpoint.complete(f).tensors(key) for f in (whole, tmp_path / "timed" / "pre"))
        assert all(one[name].equal(two[name]) for name in one)


def test_what_evaluation_needs_is_checked_before_the_first_step(tmp_path, capsys):
    file = small.recipe(tmp_path, small.SIT, channels=3)
    out = tmp_path / "run"
    (tmp_path / "weights.pt").write_bytes(b"no network")
    asked = [
        str(file),
        "eval.metric=fd_dinov2",
        f"eval.weights={tmp_path / 'weights.pt'}",
        f"eval.reference={tmp_path / 'r.npz'}",
    ]
    (tmp_path / "r.npz").write_bytes(b"no archive")
    assert cli.main(["train", *asked, "--out", str(out), "--stages", "pre"]) == 2
    assert "weights.pt" in capsys.readouterr().err and not out.exists()
    assert cli.main(["train", str(file), "eval.reference=nowhere.npz", "--out", str(out)]) == 2
    assert "eval.reference: 'nowhere.npz' is no file" in capsys.readouterr().err and not out.exists()


def test_a_run_that_has_begun_goes_on_without_what_evaluation_needs(tmp_path, capsys):
    file, out = small.recipe(tmp_path, small.SIT, channels=5), tmp_path / "run"
    assert cli.main(["train", str(file), "--out", str(out), "--stages", "pre"]) == 0  # pictures of 5 channels are drawn
    assert list((out / "pre" / "grids").iterdir())
    capsys.readouterr()
    asked = ["train", str(file), "eval.reference=nowhere.npz", "--out", str(out), "--stages", "pre"]
    assert cli.main(asked) == 0  # the report says so too
    said = capsys.readouterr().err
    assert "evaluations will fail (eval.reference: 'nowhere.npz' is no file" in said and "training goes on" in said
    assert cli.main([*asked, "eval.on_error=stop"]) == 2
    assert json.loads((out / "run.json").read_text())["run"]["eval"]["on_error"] == "continue"
