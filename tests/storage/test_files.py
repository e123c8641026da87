"""A file that does not fit is named, and nothing of it is left; what was there before stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_fast.cli import main, train
from cmt_fast.render import grids, plots
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import exits
from cmt_fast.storage import files, filesystem
from tests.fixtures.tiny import tiny


def no_room(*_, **__):
    """What the system says of a write: it names no file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch):
    """A disk without room for a byte; names still fit."""
    monkeypatch.setattr(Path, "write_bytes", lambda self, _: (self.touch(), no_room()))
    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: (self.touch(), no_room()))
    monkeypatch.setattr(Image.Image, "save", lambda _, path, **__: (Path(path).touch(), no_room()))


def draw(figure):
    figure.subplots().plot([0, 1])
    figure.savefig = lambda path, **_: (Path(path).touch(), no_room())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "new"),
        lambda path: files.write_bytes(path, b"new"),
        lambda path: grids._save(Image.fromarray(np.zeros((2, 2), np.uint8)), path),
        lambda path: plots.png(draw, path, 1, 1),
    ],
)
def test_a_file_that_finds_no_room_is_named_and_the_old_one_stays(write, tmp_path, full):
    path = tmp_path / "file.png"
    with open(path, "w") as file:
        file.write("old")
    with pytest.raises(OSError) as refused:
        write(path)
    assert refused.value.errno == errno.ENOSPC and str(tmp_path) in str(refused.value.filename)
    assert os.listdir(tmp_path) == ["file.png"] and path.read_text() == "old"


def test_a_name_that_an_error_has_stays(tmp_path):
    with pytest.raises(OSError) as refused, files.by_rename(tmp_path / "a"):
        raise OSError(errno.EACCES, "no", "b")
    assert refused.value.filename == "b" and not os.listdir(tmp_path)


def test_a_recipe_that_finds_no_room_is_not_half_there(tmp_path, full, capsys):
    assert main(["recipes", "copy", "digits", str(target := tmp_path / "mine.yaml")]) == exits.DISK_FULL
    assert f"cmt: {target}: No space left on device" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_start_on_a_full_disk_says_what_it_needs(tmp_path, full, monkeypatch):
    """Also where not even the probe of the file system fits."""
    work = Workspace(tiny(), tmp_path / "run")
    with pytest.raises(OSError) as refused:
        filesystem.probe(tmp_path)
    assert refused.value.filename == str(tmp_path)
    monkeypatch.setattr(files, "free", lambda _: 0)
    with pytest.raises(files.DiskFull, match="it needs [0-9,]+ bytes and 0 are free"):
        train._disk(work, ["pre"])
    monkeypatch.setattr(files, "free", lambda _: None)  # a quota: the file system does not say
    with pytest.raises(OSError, match="No space left on device: .*"):
        train._disk(work, ["pre"])
    assert not os.listdir(tmp_path)
