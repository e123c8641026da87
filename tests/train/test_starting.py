"""What a stage begins from, on ranks that see a folder late."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from cmt_fast.cli import train
from cmt_fast.run import resolved
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint, sound
from cmt_fast.teacher import solver_record
from cmt_fast.train import loop, solver_choice, starting, steps
from tests.fixtures.tiny import tiny


@pytest.fixture
def second(monkeypatch):
    """This process as rank 1 of 2; the list is what rank 0 says, which rank 0 is the first to say."""
    said = list[bytes]()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(
        distributed, "from_first", lambda call, kind=OSError: said[0] if said else said.append(call()) or said[0]
    )
    monkeypatch.setattr(distributed, "meet", lambda call, every_s: call())
    return said


def save(stage, step):
    checkpoint.save(stage, step, {"model": {"w": torch.zeros(2)}}, {"stage": stage.name, "nimg": step, "done": False})


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_sees(tmp_path, second):
    save(tmp_path / "pre", 1)
    save(tmp_path / "pre", 2)
    first = starting.newest(tmp_path / "pre")
    shutil.rmtree(first.folder)  # as a listing of before it was there
    assert starting.newest(tmp_path / "pre") == first and first.manifest["step"] == 2
    second[:] = [b"null"]
    assert starting.newest(tmp_path / "pre") is None


def test_a_rank_waits_for_checkpoints_that_it_sees_late(tmp_path, second, monkeypatch):
    """A stage is begun from one that the first rank wrote a second ago; what never comes is waited for so long and no longer."""
    save(tmp_path / "mid", 3)
    second.append(json.dumps(starting._listed(tmp_path)).encode())
    steps, looks = checkpoint.steps, []

    def late(stage):
        looks.append(stage.name)
        return [] if looks.count(stage.name) < 3 else steps(stage)

    monkeypatch.setattr(checkpoint, "steps", late)
    monkeypatch.setattr(distributed.time, "sleep", lambda s: None)
    starting.all_see(tmp_path)
    assert looks.count("mid") == 3  # of its own word, of one that is late, of one that is not
    monkeypatch.setattr(distributed, "LATE_S", 0.0)
    monkeypatch.setattr(checkpoint, "steps", lambda stage: [])
    starting.all_see(tmp_path)


def test_a_solver_that_was_chosen_is_what_the_first_rank_reads(tmp_path, second):
    kept = solver_record.Kept({"nfe": 4}, True, 1.0, {}, {}, 1, 1, [])
    second.append(json.dumps(kept._asdict()).encode())
    assert solver_choice._of_the_first(tmp_path / "mid") == kept


def test_what_is_left_to_do_is_asked_by_one_rank_alone(tmp_path, monkeypatch):
    """The space on a disk is the first rank's to look at: a collective call there would be waited for by none."""
    monkeypatch.setattr(distributed, "largest", lambda n: pytest.fail("the other ranks are elsewhere"))
    stage = resolve(tiny(), "pre", tmp_path)
    about = {"stage": "pre", "nimg": 640, "done": True, "unseen": True}
    checkpoint.save(stage.folder, 20, {"model": {"w": torch.zeros(2)}}, about)
    assert not train._finished(stage)
    (stage.folder / "grids").mkdir()
    (stage.folder / "grids" / "00000020.png").touch()
    assert train._finished(stage)


def test_a_slower_machine_looks_for_signals_as_often(tmp_path, monkeypatch):
    """Rows every two steps; the process before took a thousandth of the time for each."""
    plan, one, looks = resolved.schedule, steps.Steps._one, []
    monkeypatch.setattr(resolved, "schedule", lambda *given: plan(*given)._replace(log_every=2, checkpoint_every=4))
    space = Workspace(tiny("digits", "pre.images_nimg=512", "pre.warmup_nimg=0"), tmp_path)
    loop.train(space, ["pre"])
    checkpoint.set_aside(checkpoint.folder_of(tmp_path / "pre", 16))
    file = checkpoint.folder_of(tmp_path / "pre", 12) / "manifest.json"
    about = sound.read(file)
    file.write_text(sound.signed({**about, "wall": {**about["wall"], "train_s": 1e-4}}))
    monkeypatch.setattr(steps, "LOOK_S", 0.02)
    monkeypatch.setattr(steps.Steps, "_one", lambda self, step: (time.sleep(0.02), one(self, step))[1])
    asked = steps.Steps._asked
    monkeypatch.setattr(
        steps.Steps, "_asked", lambda self, given: (looks.append(self.engine.step_count), asked(self, given))[1]
    )
    loop.train(space, ["pre"])
    assert looks == [13, 14, 15, 16]
