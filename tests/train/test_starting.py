"""What a stage begins from, on ranks that see a folder late."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint
from cmt_fast.train import starting


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
    monkeypatch.setattr(starting.time, "sleep", lambda s: None)
    starting.all_see(tmp_path)
    assert looks.count("mid") == 3  # of its own word, of one that is late, of one that is not
    monkeypatch.setattr(starting, "LATE_S", 0.0)
    monkeypatch.setattr(checkpoint, "steps", lambda stage: [])
    starting.all_see(tmp_path)
