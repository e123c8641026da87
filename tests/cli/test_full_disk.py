"""A disk without room: said before the first step where the run's own arithmetic knows, and its exit code is its own."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from cmt_fast.cli import main, trajectories
from cmt_fast.cost import disk
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import exits, streams
from cmt_fast.storage import checkpoint, files
from cmt_fast.train import loop
from tests.fixtures.tiny import SMALL, tiny

SHORT = [f"{stage}.images_nimg=64" for stage in ("pre", "mid")]


def command(out, *more: str) -> list[str]:
    return ["train", "digits", *SMALL, *SHORT, "--out", str(out), "--stages", "pre", *more]


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "free", lambda folder: 20_000)
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trains"))
    assert main(command(tmp_path / "run")) == exits.DISK_FULL == 75
    said = capsys.readouterr()
    assert "checkpoints of pre: No space left on device: it needs " in said.err and "20,000 are free" in said.err
    assert said.err.count("\n") == 1 and said.out.count("disk: ") == 1 and not list(tmp_path.iterdir())


def test_a_time_that_is_none_is_an_error(tmp_path, capsys):
    assert main(command(tmp_path / "run", "--disk-wait", "soon")) == 2
    assert "--disk-wait: 'soon' is no time" in capsys.readouterr().err


def test_what_is_on_disk_counts_and_later_stages_are_a_note(tmp_path, monkeypatch):
    work = Workspace(tiny("digits", *SHORT), tmp_path)
    stages = [work.stage("pre"), work.stage("mid")]
    one, other = (disk.checkpoint(stage, work.parameters) for stage in stages)
    many = [disk.saves(stage) for stage in stages]
    first, both = disk.needs(stages, work.parameters)
    assert first == many[0] * one and both == min(2, many[0]) * one + many[1] * other
    monkeypatch.setattr(files, "free", lambda folder: both)
    assert disk.check(stages, work.parameters, tmp_path) is None
    monkeypatch.setattr(files, "free", lambda folder: both - 1)
    assert "up to the end of mid checkpoints take" in (disk.check(stages, work.parameters, tmp_path) or "")
    loop.train(work, ["pre"])
    folder = checkpoint.complete(tmp_path / "pre").folder
    real = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert one == pytest.approx(real, rel=0.15)  # headers count in a network of a few thousand parameters
    assert disk.needs(stages, work.parameters)[0] == one  # an old one goes when the new one is whole


def test_a_stage_of_one_checkpoint_needs_room_for_one(tmp_path):
    stage = Workspace(tiny("digits", "pre.images_nimg=32", "pre.grid_every_nimg=null"), tmp_path).stage("pre")
    assert disk.saves(stage) == 1 and disk.needs([stage], 1000) == [disk.checkpoint(stage, 1000)]


def test_a_disk_that_does_not_say_what_is_free_refuses_nothing(tmp_path, monkeypatch, capsys):
    """As some network file systems, of which all numbers are 0."""
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: (0, 0, 0))
    stage = Workspace(tiny("digits", *SHORT), tmp_path).stage("mid")
    trajectories._room(tmp_path / "store", 10, stage, (1, 8, 8), "fp16")
    assert disk.check([stage], 1000, tmp_path) is None and "free" not in disk.line(stage, (1, 8, 8), 1000, tmp_path)
    assert "10 trajectories" in (said := capsys.readouterr().out) and "free" not in said


def test_a_run_trains_on_where_its_output_is_lost(tmp_path):
    """A job's output often goes to a file of the disk that is full; what is no lack of room is an error as ever."""
    with open("/dev/full", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        with pytest.raises(OSError, match="No space left"):
            print("lost", flush=True)
        with streams.unless_lost():
            for _ in range(5000):
                print("lost", flush=True)
        file.close()  # nothing is left that would make an error of the end

    class Closed:
        def write(self, text):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with contextlib.redirect_stdout(Closed()), streams.unless_lost(), pytest.raises(OSError, match="Bad file"):
        print("lost")
