"""Steps that are not finite: nothing is changed by them, their layer is named, and the run stops, skips or rolls back."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench.safety import planted
from cmt_fast.cli import main
from cmt_fast.run import resolved
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import exits
from cmt_fast.storage import checkpoint, sound
from cmt_fast.train import batches, checks, loop, nonfinite, replay
from cmt_fast.train import steps as taking
from tests.fixtures.tiny import metrics, source_of, tiny
from tests.train.test_resume import assert_equal_stage

LENGTH = ["pre.images_nimg=256", "pre.checkpoint_every_nimg=128", "pre.warmup_nimg=0"]  # 8 steps, a row at each


def work(folder, *more):
    return Workspace(tiny("digits", *LENGTH, *more), folder)


def spoilt(folder, when, kind="gradient", layer="net.blocks.0.fc1", stage="pre", space=None):
    """Train with NaN planted; the stage's folder."""
    with planted.nan(kind, layer, when):
        loop.train(space or work(folder), [stage])
    return folder / stage


@pytest.mark.parametrize(
    "kind, begins", [("loss", "begins at net.blocks.0.fc1"), ("gradient", "backward pass at net.blocks.0.fc1")]
)
def test_a_step_that_is_not_finite_stops_the_run_and_is_told_with_the_way_on(kind, begins, tmp_path):
    with pytest.raises(nonfinite.NotFinite) as told:
        spoilt(tmp_path, lambda step: step == 1, kind)
    text = str(told.value)
    assert text.startswith("pre: step 2 is not finite: ") and begins in text
    assert "the stage has no checkpoint yet" in text and f"cmt replay {tmp_path / 'pre'} --step 2" in text
    dump = json.loads((tmp_path / "pre" / "nonfinite" / "step-00000002.json").read_text())
    assert dump["seed"] == 0 and dump["decided"] == "stop" and begins in dump["where"]
    assert len(dump["ranks"][0]["rows"]["data"]) == 32 and not checkpoint.steps(tmp_path / "pre")
    assert [row["step"] for row in metrics(tmp_path / "pre")] == [1]
    with pytest.raises(nonfinite.NotFinite, match="the checkpoint of step 4 is from before it"):
        spoilt(tmp_path, lambda step: step == 6, kind)


def test_a_skipped_step_is_none_for_the_optimizer_and_counted(tmp_path):
    """Stopped between and gone on with, or not: the same run."""
    skip = "on_nonfinite=skip"
    bad = lambda step: step in (2, 5)
    whole = spoilt(tmp_path / "whole", bad, space=work(tmp_path / "whole", skip))
    rows = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [row.get("nonfinite_steps", 0) for row in rows] == [0, 0, 1, 1, 2, 2]  # those of steps 3 and 6 are none
    assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])).all() for row in rows)
    manifest = checkpoint.latest(whole).manifest
    assert manifest["nonfinite"] == {"skipped": [3, 6]} and manifest["done"]
    with pytest.raises(nonfinite.NotFinite):
        spoilt(tmp_path / "run", bad, space=work(tmp_path / "run"))
    spoilt(tmp_path / "run", bad, space=work(tmp_path / "run", skip))
    assert_equal_stage(whole, tmp_path / "run" / "pre")


def test_who_looks_late_as_on_a_gpu_takes_the_same_steps_again(tmp_path, monkeypatch):
    """Rows every four steps; what is not finite in between is seen there, and no step after it has changed anything."""
    plan = resolved.schedule
    monkeypatch.setattr(resolved, "schedule", lambda *given: plan(*given)._replace(log_every=4))
    taken, one = [], taking.Steps._one
    monkeypatch.setattr(taking.Steps, "_one", lambda self, step: (taken.append(step), one(self, step))[1])
    bad = lambda step: step in (4, 5)
    folders = [spoilt(tmp_path / "now", bad, space=work(tmp_path / "now", "on_nonfinite=skip"))]
    assert taken == list(range(8))
    taken.clear()
    monkeypatch.setattr(nonfinite.Guard, "at_once", property(lambda _: False, lambda *_: None), raising=False)
    folders.append(spoilt(tmp_path / "late", bad, space=work(tmp_path / "late", "on_nonfinite=skip")))
    assert taken == [*range(8), 5, 6, 7, 6, 7]
    assert_equal_stage(*folders)
    assert [row["step"] for row in metrics(folders[1]) if row["kind"] == "train"] == [4, 8]


def test_so_many_in_a_row_stop_the_run(tmp_path):
    settings = "on_nonfinite=skip", "pre.nonfinite_limit=2"
    with pytest.raises(
        nonfinite.NotFinite, match=r"step 5 is not finite.* 2 steps before it were skipped \(nonfinite_limit\)"
    ):
        spoilt(tmp_path, lambda step: step >= 2, space=work(tmp_path, *settings))


def test_a_run_rolls_back_to_other_noise_and_ends_the_same_after_a_kill(tmp_path):
    def once():
        left = [1]
        return lambda step: step == 6 and bool(left and left.pop())

    back = "on_nonfinite=rollback"
    whole = spoilt(tmp_path / "whole", once(), space=work(tmp_path / "whole", back))
    assert checkpoint.latest(whole).manifest["nonfinite"] == {"rollbacks": [{"step": 7, "from": 4, "redraw": 1}]}
    plain = spoilt(tmp_path / "plain", lambda step: False)
    losses = [[row["loss"] for row in metrics(folder) if row["kind"] == "train"] for folder in (plain, whole)]
    assert losses[0][:4] == losses[1][:4] and losses[0][4] != losses[1][4]

    def killed(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first = once()
        spoilt(tmp_path / "run", lambda s: first(s) or (s == 5 and not first.__closure__[0].cell_contents and killed(s)),
               space=work(tmp_path / "run", back))  # fmt: skip
    spoilt(tmp_path / "run", lambda step: False, space=work(tmp_path / "run"))
    assert_equal_stage(whole, tmp_path / "run" / "pre")


def test_a_step_on_trajectories_is_another_one_after_a_rollback(tmp_path):
    """Its objective draws nothing itself: all of its noise is the pool's."""
    space = work(tmp_path, "mid.images_nimg=256")
    loop.train(space, ["pre"])
    source = source_of(space, "mid")
    first, source.redraws = source.draw(5).own.points, [(4, 1)]
    assert not torch.equal(first.x, source.draw(5).own.points.x)
    source.redraws = [(6, 1)]
    assert torch.equal(first.x, source.draw(5).own.points.x)


def test_steps_with_other_noise_are_replayed_as_what_they_are(tmp_path):
    left = [1]
    back = work(tmp_path, "on_nonfinite=rollback")
    spoilt(tmp_path, lambda step: step == 6 and bool(left and left.pop()), space=back)
    assert [(len(found.recorded), found.sound) for found in (replay.replay(back, "pre", n) for n in (4, 6))] == [
        (1, True)
    ] * 2


def test_a_step_that_was_skipped_is_none_when_later_ones_are_replayed(tmp_path):
    """Also where it is finite now, as after a flipped bit: no later step is told to be another for it."""
    skip = work(tmp_path, "on_nonfinite=skip")

    def bad(step):
        if step == 7:
            raise KeyboardInterrupt
        return step in (1, 5)

    with pytest.raises(KeyboardInterrupt):
        spoilt(tmp_path, bad, space=skip)
    assert checkpoint.latest(tmp_path / "pre").manifest["nonfinite"] == {"skipped": [2]}  # of step 6 its dump knows
    replayed = [replay.replay(skip, "pre", step) for step in (3, 4, 7)]
    assert [(found.start, len(found.recorded), found.sound) for found in replayed] == [(0, 1, True)] * 2 + [
        (4, 1, True)
    ]


def test_a_checkpoint_that_is_being_written_is_waited_for_and_all_parts_are_traced(tmp_path, monkeypatch):
    save, draw, parts = checkpoint.save, batches.BatchProvider.draw, []
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (time.sleep(0.3), save(*a, **k))[1])
    monkeypatch.setattr(
        batches.BatchProvider,
        "draw",
        lambda self, step, part=0: (parts.append((step, part)), draw(self, step, part))[1],
    )
    with pytest.raises(nonfinite.NotFinite, match="the checkpoint of step 4 is from before it"):
        spoilt(tmp_path, lambda step: step == 4, space=work(tmp_path, "pre.micro_batch=16"))
    assert parts[-4:] == [(4, 0), (4, 1)] * 2  # taken, traced


def test_replay_gives_the_recorded_hashes_and_finds_what_is_not_as_it_was(tmp_path, capsys):
    loop.train(work(tmp_path), ["pre"])
    at = ["replay", str(tmp_path / "pre"), "--step"]
    assert main([*at, "6"]) == 0
    said = capsys.readouterr().out
    assert "from the checkpoint of step 4" in said and said.count("  equal") == 3 and "as recorded" in said
    assert main([*at, "4"]) == 0 and "checkpoint equal" in capsys.readouterr().out
    with planted.kernel("gelu", lambda y: y * 1.01):
        assert main([*at, "6"]) == exits.FAILED
    assert "net.blocks.0.fc1 is 1.0e-02 from the same ops in plain torch" in capsys.readouterr().err
    path = tmp_path / "pre" / checks.CHECKS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines).replace(b'"step":6', b'"step":9'))  # a line whose checksum is another's is none
    assert not checks.read(tmp_path / "pre", 6) and not checks.read(tmp_path / "pre", 9)
    path.write_bytes(b"".join(lines))
    with planted.nan("loss", "net.blocks.0.fc2", lambda step: step == 5):
        assert main([*at, "6"]) == exits.NOT_FINITE
    assert "step 6 is not finite: begins at net.blocks.0.fc2" in capsys.readouterr().err
    assert main([*at, "99"]) == exits.WRONG_INPUT


def test_steps_that_were_laid_out_otherwise_are_no_alarm(tmp_path, capsys):
    """A run that goes on in smaller parts rounds otherwise; from the checkpoint that it went on from it is compared again."""
    loop.train(work(tmp_path), ["pre"])
    checkpoint.set_aside(checkpoint.folder_of(tmp_path / "pre", 8))
    parts = work(tmp_path, "pre.micro_batch=16")
    loop.train(parts, ["pre"])
    found = {step: replay.replay(parts, "pre", step) for step in (3, 4, 6, 8)}
    assert all(r.sound for r in found.values()) and found[8].saved
    assert [(len(r.recorded), len(r.alike)) for r in found.values()] == [(1, 0), (1, 0), (2, 1), (2, 1)]
    assert main(["replay", str(tmp_path / "pre"), "--step", "4"]) == 0
    assert "recorded as local on cpu, parts 1, not local on cpu, parts 2" in capsys.readouterr().out
    (tmp_path / "pre" / checks.CHECKS).unlink()
    file = checkpoint.folder_of(tmp_path / "pre", 8) / "manifest.json"
    about = sound.read(file)
    file.write_text(sound.signed({**about, "engine": {**about["engine"], "processes": 2}}))
    assert replay.replay(parts, "pre", 8).sound and replay.replay(parts, "pre", 8).saved is None


def test_a_bit_that_was_flipped_while_a_step_was_trained_is_found(tmp_path):
    class Flip:
        done = False

    def flip(step):
        if step == 4 and not Flip.done:
            Flip.done = True
            Flip.engine.p.data.view(torch.int32)[7] ^= 1 << 3
        return False

    build = loop.Workspace.engine_of
    with pytest.MonkeyPatch.context() as patch:

        def kept(*args, **more):
            Flip.engine = build(*args, **more)
            return Flip.engine

        patch.setattr(loop.Workspace, "engine_of", kept)
        spoilt(tmp_path, flip)
    replayed = {step: replay.replay(work(tmp_path), "pre", step) for step in (4, 5, 6)}
    assert replayed[4].sound and replayed[5].differs == ["parameters"] and replayed[5].worst is None
    assert {"gradient", "parameters"} <= set(replayed[6].differs)


def test_a_tangent_that_is_not_finite_is_named(tmp_path):
    space = Workspace(
        tiny("digits-mf", "control.images_nimg=128", "control.warmup_nimg=0", "control.start=null"), tmp_path
    )
    with pytest.raises(nonfinite.NotFinite, match="begins at the tangent of net.blocks.0.fc2"):
        spoilt(tmp_path, lambda step: step == 1, "tangent", "net.blocks.0.fc2", "control", space)
