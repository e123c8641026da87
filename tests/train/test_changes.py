"""`cmt train ... --change`: a stage goes on by other settings, on record, and every resume after it ends with the same bits."""

from __future__ import annotations

import json
import shutil

import pytest

from cmt_fast import cli
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.fingerprint import stage_digest
from cmt_fast.report import events, page
from cmt_fast.run import changes, standing
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime.signals import Stopped
from cmt_fast.storage import checkpoint, sound
from cmt_fast.train import checks, loop, replay
from cmt_fast.train import steps as taking
from tests.fixtures.tiny import metrics, tiny
from tests.train.test_resume import assert_equal_stage

MORE = ["pre.images_nimg=640", "pre.checkpoint_every_nimg=64", "pre.lr=1e-3"]
CHANGED = ["pre.lr=1e-4", "pre.batch=16", "pre.images_nimg=704", "pre.precision=bf16"]


def stop_after(work: Workspace, step: int, names=("pre",)) -> None:
    """Train, and be asked to stop once the checkpoint of a step is on disk."""
    asked, save = [], taking.Steps._checkpoint

    def checkpointed(self, n, *given, **more):
        save(self, n, *given, **more)
        if n >= step:
            asked.append(15)

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "noted", lambda: loop.contextlib.nullcontext(asked))
    patch.setattr(taking.Steps, "_checkpoint", checkpointed)
    try:
        loop.train(work, list(names))
    except Stopped:
        pass
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A stage that was stopped half-way, after 7 of 20 steps."""
    out = tmp_path_factory.mktemp("changes") / "half"
    stop_after(Workspace(tiny("digits", *MORE), out), 6)
    assert checkpoint.steps(out / "pre")[-1] == 7
    return out


def changed(out, *texts) -> Workspace:
    """The run in a folder as `--change` goes on with it."""
    run, asked = changes.asked(Workspace(tiny("digits", *MORE), out).run, out, texts)
    work = Workspace(run, out)
    work.changing = asked
    return work


def test_a_change_is_on_record_and_resumed_runs_are_equal_to_the_bit(half, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(half, one)
    shutil.copytree(half, two)
    loop.train(changed(one, *CHANGED), ["pre"])
    stop_after(changed(two, *CHANGED), 11)  # each of these is a start of its own
    stored = loading.build(json.loads((two / "run.json").read_text())["run"])
    told = json.loads((two / "run.json").read_text())
    told = {key: value for key, value in told.items() if key != "changes"}
    (two / "run.json").write_text(sound.signed(told))  # as one that was written anew: the manifests know
    stop_after(Workspace(stored, two), 20)
    adopted, notes = changes.adopted(tiny("digits", *MORE), two)
    assert adopted == stored and len(notes) == 4 and "pre.lr is 0.0001 since step 7 (--change)" in notes
    loop.train(Workspace(adopted, two), ["pre"])
    assert_equal_stage(one / "pre", two / "pre")
    manifest = checkpoint.complete(one / "pre").manifest
    keys = {"lr": [1e-3, 1e-4], "batch": [32, 16], "images_nimg": [640, 704], "precision": ["fp32", "bf16"]}
    assert manifest["changes"] == [{"step": 7, "nimg": 224, "rows": 224, "log_every": 1, "keys": keys}]
    assert json.loads((one / "run.json").read_text())["changes"]["pre"] == manifest["changes"]
    assert manifest["config"] != stage_digest(stored, "pre") != stage_digest(tiny("digits", *MORE), "pre")
    assert (manifest["step"], manifest["nimg"]) == (37, 704)  # 7 of 32, then 30 of 16
    rows = [row for row in metrics(one / "pre") if row["kind"] == "train"]
    assert [row["nimg"] for row in rows] == [*range(32, 225, 32), *range(240, 705, 16)]
    assert rows[7]["lr"] == pytest.approx(1e-4 * (1 - 224 / 704), rel=0.03)
    stands = {"pre": standing.of(stored, one, None, "pre")}
    assert events.table(stands).rows[0][:4] == ["pre", "7", "224", "settings changed"]
    assert stands["pre"].images(7) == 224 and stands["pre"].images(8) == 240 and stands["pre"].images(2) == 64


def test_a_step_is_replayed_by_the_settings_of_its_time(half, tmp_path):
    """Step 8 was taken before the change, too: that is another step, and no fault of this one's."""
    shutil.copytree(half, tmp_path / "run")
    shutil.copytree(checkpoint.folder_of(half / "pre", 7), kept := tmp_path / "kept")
    stop_after(Workspace(tiny("digits", *MORE), tmp_path / "more"), 8)
    shutil.copy(tmp_path / "more" / "pre" / checks.CHECKS, tmp_path / "run" / "pre")
    stop_after(changed(tmp_path / "run", *CHANGED), 9)
    stored = loading.build(json.loads((tmp_path / "run" / "run.json").read_text())["run"])
    again = lambda step: replay.replay(Workspace(stored, tmp_path / "run"), "pre", step)
    with pytest.raises(ConfigError, match=r"settings were changed at step 7, and no checkpoint from there to step 8"):
        again(8)
    shutil.copytree(kept, checkpoint.folder_of(tmp_path / "run" / "pre", 7))
    for step, start in ((7, 0), (8, 7), (10, 7)):
        found = again(step)
        assert found.start == start and len(found.recorded) == 1 and found.sound, (step, found)


def test_snapshots_of_settings_that_count_no_more_are_gone(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    track = tmp_path / "run" / "pre" / "snapshots" / "ema-0"
    for step in (7, 8):
        shutil.copytree(checkpoint.folder_of(half / "pre", 7), checkpoint.folder_of(track, step))
    stop_after(Workspace(tiny("digits", *MORE), tmp_path / "run"), 8)
    assert checkpoint.steps(track) == [7, 8]  # the same steps, and they will be written over
    shutil.rmtree(tmp_path / "run" / "pre" / "checkpoints")
    shutil.copytree(half / "pre" / "checkpoints", tmp_path / "run" / "pre" / "checkpoints")
    stop_after(changed(tmp_path / "run", "pre.batch=16"), 8)
    assert checkpoint.steps(track) == [7]


def test_a_batch_of_cached_trajectories_stays(half, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_can", lambda *_: None)
    run = tiny("digits", "mid.trajectories.cache=/somewhere")
    assert changes.asked(run, half, ["mid.lr=1e-5"])[1]
    with pytest.raises(ConfigError, match="^--change: mid.batch cannot be changed: trajectories.cache"):
        changes.asked(run, half, ["mid.batch=16"])


def test_rows_of_data_go_on_where_they_were(half, tmp_path, monkeypatch):
    shutil.copytree(half, tmp_path / "run")
    seen, rows = [], loop.batches.BatchProvider._data

    def drawn(self, random, step, mine, part):
        monkeypatch.setattr(
            self.loader,
            "rows",
            lambda p, real=self.loader.__class__.rows: seen.extend(p.tolist()) or real(self.loader, p),
        )
        return rows(self, random, step, mine, part)

    monkeypatch.setattr(loop.batches.BatchProvider, "_data", drawn)
    loop.train(changed(tmp_path / "run", "pre.batch=16"), ["pre"])
    assert seen == list(range(224, 640))


def test_a_change_moves_to_the_checkpoint_before_where_its_own_is_damaged(half, tmp_path, capsys):
    shutil.copytree(half, tmp_path / "run")
    work = changed(tmp_path / "run", "pre.lr=1e-4")
    file = checkpoint.folder_of(tmp_path / "run" / "pre", 7) / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    loop.train(work, ["pre"])
    before = checkpoint.complete(tmp_path / "run" / "pre").manifest["changes"]
    assert [entry["step"] for entry in before] == [6] and before[0]["keys"] == {"lr": [1e-3, 1e-4]}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["changes"]["pre"] == before
    assert "from step 6 (192 images) on lr 0.0001 (before: 0.001)" in capsys.readouterr().out


def test_a_change_that_is_asked_for_again_is_none_and_one_that_is_taken_back_leaves_no_trace(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    work = changed(tmp_path / "run", "pre.lr=1e-4")
    with work.lock():
        work.claim(["pre"])
    stored = loading.build(json.loads((tmp_path / "run" / "run.json").read_text())["run"])
    assert changes.asked(stored, tmp_path / "run", ["pre.lr=1e-4"]) == (stored, {})
    run, asked = changes.asked(stored, tmp_path / "run", ["pre.lr=1e-3"])
    back = Workspace(run, tmp_path / "run")
    back.changing = asked
    loop.train(back, ["pre"])
    whole = Workspace(tiny("digits", *MORE), tmp_path / "whole")
    loop.train(whole, ["pre"])
    assert_equal_stage(tmp_path / "run" / "pre", tmp_path / "whole" / "pre")
    assert "changes" not in checkpoint.complete(tmp_path / "run" / "pre").manifest


@pytest.mark.parametrize(
    "text, said",
    [
        ("pre.seed=1", "pre.seed cannot be changed while a stage is under way; those that can are lr, "),
        ("pre.optimizer=radam", "pre.optimizer cannot be changed"),
        ("data.kind=npz", "'data.kind' is no key of a stage; stages are pre, mid, post, control"),
        ("pre.lr", "'pre.lr' is not of the form STAGE.KEY=VALUE"),
        ("pre.grid_every_nimg=3", "pre.grid_every_nimg changes no weight; give it without --change"),
        (
            "mid.trajectories.rollout_batch=8",
            "mid.trajectories.rollout_batch changes no weight; give it without --change",
        ),
        ("pre.precision=fp16", "fp16 has a loss scale"),
        ("pre.images_nimg=100", "pre.images_nimg: 100 is not above the 224 images that it has seen"),
        ("mid.lr=1e-5", "has not begun; set its keys without --change"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name(half, text, said):
    with pytest.raises(ConfigError, match="^--change: ") as refused:
        changes.asked(tiny("digits", *MORE), half, [text])
    assert said in str(refused.value)


def test_another_setting_without_change_is_refused_and_says_how(half):
    with pytest.raises(ConfigError, match=r"pre.lr: 0.001 -> 0.0001.*or ask for it by --change"):
        Workspace(tiny("digits", *MORE, "pre.lr=1e-4"), half).compare()


def test_what_lays_the_same_work_out_otherwise_is_taken_up_on_the_way(half, tmp_path, capsys):
    """What an out-of-memory error names must not ask for a new folder where it changes no bit."""
    out, whole, layout = tmp_path / "run", tmp_path / "whole", ["model.checkpoint_activations=true"]
    shutil.copytree(half, out)
    run = tiny("digits", *MORE, *layout, "mid.trajectories.rollout_batch=64")
    assert Workspace(run, out).run.model.checkpoint_activations
    Workspace(run, out).compare()
    loop.train(Workspace(run, out), ["pre"])
    assert "left behind" not in capsys.readouterr().out  # torch's checkpointing brings its compiler
    loop.train(Workspace(tiny("digits", *MORE), whole), ["pre"])
    assert_equal_stage(out / "pre", whole / "pre")
    with pytest.raises(ConfigError, match="model.depth"):
        Workspace(tiny("digits", *MORE, "model.depth=2"), whole).compare()


def test_the_command_goes_on_with_a_change_by_resume_and_says_so(half, tmp_path, capsys, monkeypatch):
    out, write = tmp_path / "run", page.write
    monkeypatch.setattr(page, "write", lambda folder, **more: write(folder, judge=False))
    shutil.copytree(half, out)
    assert cli.main(["train", "--resume", str(out), "--stages", "pre", "--change", "pre.lr=1e-4"]) == 0
    assert "from step 7 (224 images) on lr 0.0001 (before: 0.001)" in capsys.readouterr().out
    assert "settings changed" in (out / "report.md").read_text()
    assert cli.main(["train", "--resume", str(out), "--stages", "pre", "--change", "pre.lr=1e-5"]) == 2
    assert "pre of " in (said := capsys.readouterr().err) and "is finished" in said


def test_schedules_without_a_change_are_what_they_were():
    """Learning rates and progress in images are bit for bit those in steps."""
    for total, batch in ((37, 32), (1000, 24), (7, 3)):
        run = tiny("digits", f"pre.images_nimg={total * batch}", f"pre.batch={batch}", f"pre.warmup_nimg={5 * batch}")
        stage = resolve(run, "pre")
        plan = stage.schedule
        for step in range(total):
            assert plan.lr(stage.config, step) == stage.config.lr * (min(1.0, (step + 1) / 5) * (1 - step / total))
            assert plan.progress(step) == step / total
