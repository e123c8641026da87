"""Where stages stand and whether a run lives, of folders that are made up: no network, no data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cmt_fast.report.runs import Known, Newest
from cmt_fast.report.runs_tables import _paired, _ratios, incomparable, state
from cmt_fast.run import folder as folder_
from cmt_fast.run import removing, standing
from cmt_fast.run.standing import Standing
from cmt_fast.storage import checkpoint, heartbeat
from cmt_fast.storage.metrics_log import METRICS
from cmt_fast.storage.record import Record
from cmt_fast.usage import bills
from cmt_fast.usage.bills import Amount, Usage
from cmt_fast.watch import screen
from tests.fixtures.tiny import tiny

NOW = 2e9
RUN = tiny("digits")


def rows(run: Path, name: str, nimg: int) -> Path:
    """A stage that has begun, and has no checkpoint yet. Returns its folder."""
    (run / name).mkdir(parents=True, exist_ok=True)
    (run / name / METRICS).write_text(json.dumps({"kind": "train", "nimg": nimg}) + "\n", encoding="utf-8")
    return run / name


def saved(run: Path, name: str, nimg: int, done: bool) -> None:
    """A checkpoint of a stage, without tensors."""
    folder = checkpoint.folder_of(run / name, 1)
    folder.mkdir(parents=True)
    body = {"format": checkpoint.FORMAT, "step": 1, "nimg": nimg, "stage": name, "done": done, "files": {}}
    (folder / "manifest.json").write_text(checkpoint.signed(body), encoding="utf-8")


def touched(file: Path, age: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (NOW - age, NOW - age))


def test_a_stage_is_where_it_has_begun_and_here_before_elsewhere(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert standing.place(here, there, "mid") == here / "mid"
    saved(there, "mid", 10, done=True)
    assert standing.place(here, there, "mid") == there / "mid"
    rows(here, "mid", 3)  # metrics alone: it has begun
    assert standing.place(here, there, "mid") == here / "mid"
    rows(there, "post", 3)
    assert standing.place(here, there, "post") == there / "post"


def test_a_stage_that_is_done_is_whole_however_many_images_it_was_asked_for(tmp_path):
    whole = RUN.stages["mid"].images_nimg
    saved(tmp_path, "mid", whole // 2, done=True)
    done = standing.of(RUN, tmp_path, None, "mid")
    assert (done.share, done.state) == (1.0, "finished") and done.nimg == whole // 2
    saved(tmp_path, "post", RUN.stages["post"].images_nimg // 2, done=False)
    half = standing.of(RUN, tmp_path, None, "post")
    assert not half.done and half.share == 0.5


@pytest.mark.parametrize("own, word", [(True, "alive"), (False, "stopped")])
def test_the_pulse_of_another_run_s_stage_is_no_sign_of_this_run_s_life(tmp_path, own, word):
    folder = tmp_path / ("here" if own else "there") / "mid"
    touched(tmp_path / "here" / heartbeat.HEARTBEAT, 400)
    touched(folder / bills.ALIVE, 3)
    stage = Standing("mid", RUN.stages["mid"], folder, own)
    assert standing.life(tmp_path / "here", [stage], NOW).word == word


def known(tmp_path: Path, figures: dict[str, Newest], **own: bool) -> Known:
    """A run whose stages have 8 images and half an hour each, of its own or not."""
    bill = Usage({"core": {"train": Amount(1800.0)}})
    stages = {
        name: Standing(
            name, RUN.stages[name], tmp_path / name, mine, Record.of(rows(tmp_path, name, 8) / METRICS), None, "", bill
        )
        for name, mine in own.items()
    }
    life = standing.life(tmp_path, stages.values(), NOW)
    return Known(tmp_path, RUN, {}, stages, figures, life, 0, 0.0)


def newest(frechet: float, final: bool = True, **key) -> Newest:
    return Newest({"1": {"frechet": frechet}}, 200, final, {"eval": {"seed": 0}, **key}, {})


def test_a_run_s_images_and_hours_are_those_of_its_own_stages_and_its_figures_the_furthest_student_s(tmp_path):
    figures = {name: newest(1.0) for name in ("pre", "mid", "control")}
    run = known(tmp_path, figures, pre=False, mid=True, control=True)
    assert run.images == 16 and run.hours == {"core": 1.0} and run.last == "mid"


def test_figures_are_set_beside_each_other_only_where_they_were_taken_alike(tmp_path):
    of = lambda **key: known(tmp_path, {"post": newest(1.0, **key)}, post=True)
    assert incomparable(of(reference={"name": "a"}), of(reference={"name": "a"}), "post") == []
    assert incomparable(of(reference={"name": "a"}), of(reference={"name": "b"}), "post") == ["other reference"]
    assert _paired(of(), of(), "post") and not _paired(of(), of(eval={"seed": 1}), "post")
    one = lambda frechet, final: {"frechet": frechet, "final": final}
    alike, apart = (one(2.0, True), one(1.0, True)), (one(2.0, True), one(1.0, False))
    (row,) = _ratios("post", "mid", [alike, apart])
    assert row[1:3] == ["2", "–"]


def test_what_a_run_loses_by_being_pruned_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    saved(run, "post", 4, done=False)

    monkeypatch.setattr(removing.pruning, "spare", lambda folder, stays: [folder / "optimizer.safetensors"])
    (run / "post/snapshots").mkdir()
    (run / folder_.RUN_FILE).write_text("{}", encoding="utf-8")
    said = " ".join(removing.plan(run, "final").said)
    assert "post is unfinished, at 4 images: it cannot go on after this" in said
    assert "without snapshots `cmt ckpt reconstruct` makes no other EMA" in said


@pytest.mark.parametrize(
    "about",
    [
        {"run": {}, "parents": "runs/a"},
        {"run": {"post": {"teacher": "runs/a/pre"}}, "parents": None},
        {"run": {"mid": {"autoguidance": {"network": "runs/a/pre"}}}},
    ],
    ids=["parents", "teacher", "guide"],
)
def test_runs_that_are_taught_or_guided_by_a_run_need_it(tmp_path, monkeypatch, about):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "{}"), ("b", json.dumps({**about, "root": str(tmp_path)}))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / folder_.RUN_FILE).write_text(text, encoding="utf-8")
    assert removing.dependents(Path("runs/a")) == ["runs/b"] and removing.dependents(Path("runs/b")) == []


def test_a_sign_of_life_of_a_later_time_is_the_clock_s(tmp_path):
    touched(tmp_path / heartbeat.HEARTBEAT, -7300)
    run = known(tmp_path, {}, mid=True)
    assert run.life.word == "ahead" and state(run) == "clock ahead" and "ahead" in screen.MOODS


def test_no_run_is_beside_itself(tmp_path):
    assert folder_.beside("x/b", tmp_path / "new/b") == Path("x/b")
    assert folder_.beside("x/a", tmp_path / "new/b") == tmp_path / "new/a"
