"""Checkpoints: damage of any kind is found, the one before is used, a full disk leaves the old one."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from cmt_kernels.attention import proof

from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, debris, files
from cmt_fast.storage.checkpoint import CheckpointError
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny


@pytest.fixture
def stage(tmp_path):
    """A stage with checkpoints at steps 1 and 2."""
    for step in (1, 2):
        tensors = {"w": torch.randn(40, 5), "b": torch.randn(3)}
        checkpoint.save(
            tmp_path, step, {"model": tensors, "ema-0": {"w": tensors["w"] * 2}}, {"nimg": step, "done": False}
        )
    return tmp_path


def test_round_trip(stage):
    found = checkpoint.latest(stage)
    assert found.manifest["step"] == 2 and torch.equal(found.tensors("ema-0")["w"] / 2, found.tensors("model")["w"])
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        found.tensors("optimizer")


def test_every_flipped_bit_is_found_and_the_one_before_is_used(stage, capsys):
    dice, folder = random.Random(0), checkpoint.folder_of(stage, 2)
    files = sorted(folder.iterdir())
    for _ in range(300):
        file = dice.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        file.write_bytes(bad)
        if file.name != "manifest.json" or _same_json(good, bad) is False:
            assert checkpoint.latest(stage).manifest["step"] == 1, file.name
        file.write_bytes(good)
    said = capsys.readouterr().err.splitlines()
    assert "passed over" in said[0] and len(said) == len(set(said))  # each once


def test_damaged_checkpoints_of_later_steps_do_not_push_out_the_new_ones(tmp_path):
    """A run that passed over two goes on from the third; what it then writes is what the next one needs."""
    files = {"model": {"w": torch.ones(3)}}
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, step, files, {"nimg": step}, keep=3)
    for step in (200, 300):
        (checkpoint.folder_of(tmp_path, step) / "model.safetensors").write_bytes(b"cut")
    for step, left in ((150, [100, 150]), (180, [150, 180])):
        checkpoint.save(tmp_path, step, files, {"nimg": step})
        assert checkpoint.steps(tmp_path) == [*left, 200, 300]
        assert checkpoint.newest(tmp_path).manifest["step"] == step


def _same_json(a: bytes, b: bytearray) -> bool:
    """A flip in a manifest's white space changes nothing that is read."""
    try:
        return json.loads(a) == json.loads(bytes(b).decode())
    except ValueError:
        return False


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "trailing", "no manifest", "swapped", "not json"])
def test_other_damage(stage, damage):
    folder = checkpoint.folder_of(stage, 2)
    file = folder / "model.safetensors"
    good = file.read_bytes()
    {
        "truncate": lambda: file.write_bytes(good[:-7]),
        "empty": lambda: file.write_bytes(b""),
        "missing": file.unlink,
        "trailing": lambda: file.write_bytes(good + b"x"),
        "no manifest": (folder / "manifest.json").unlink,
        "swapped": lambda: shutil.copy(folder / "ema-0.safetensors", file),
        "not json": lambda: (folder / "manifest.json").write_text("[1, 2"),
    }[damage]()
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)
    assert checkpoint.latest(stage).manifest["step"] == 1


def test_nothing_whole_is_an_error_not_a_fresh_start(stage):
    for step in (1, 2):
        (checkpoint.folder_of(stage, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 2"):
        checkpoint.latest(stage)


def test_a_failing_write_keeps_the_old_one(stage):
    """The library's own error, on a file that the system does not let grow: as OSError, which ends the other ranks too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            checkpoint.save(stage, 3, {"model": {"w": torch.zeros(4096)}}, {"done": False})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value.filename).endswith("model.safetensors")
    room = Path(checkpoint.__file__).parent.parent
    own = [f for f in room.rglob("*.py") if re.search(r"from safetensors.*save_file", f.read_text("utf-8"))]
    assert own == [Path(files.__file__)]  # all write by the one whose errors are the system's
    assert checkpoint.steps(stage) == [1, 2] and not list((stage / "checkpoints").glob(".tmp*"))


def test_what_does_not_fit_is_refused_before_it_is_written(stage, monkeypatch):
    """By what the file system says is free; one that says nothing is written to."""
    tensors = {"model": {"w": torch.zeros(5000)}}
    monkeypatch.setattr(checkpoint, "free", lambda folder: 20_000)
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *_: pytest.fail("is written"))
    with pytest.raises(files.DiskFull, match="it needs 2[0-9],[0-9]{3} bytes and 20,000 are free"):
        checkpoint.save(stage, 3, tensors, {"done": False})
    assert checkpoint.steps(stage) == [1, 2] and not list((stage / "checkpoints").glob(".tmp*"))
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (0, 0, 0))
    checkpoint.save(stage, 3, tensors, {"done": False})


def test_retention_keeps_the_newest_that_are_whole(stage):
    """A cut one counts for none of those that are kept; where the one just written is not whole nothing goes."""
    for step in (3, 4):
        checkpoint.save(stage, step, {"model": {"w": torch.zeros(2)}}, {"done": False}, keep=4)
    (checkpoint.folder_of(stage, 4) / "model.safetensors").write_bytes(b"cut")
    checkpoint.save(stage, 5, {"model": {"w": torch.zeros(2)}}, {"done": False})
    assert checkpoint.steps(stage) == [3, 4, 5]
    (checkpoint.folder_of(stage, 5) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(OSError, match="what was written is not there"):
        checkpoint._retain(stage, 5, 1)
    assert checkpoint.steps(stage) == [3, 4, 5]


class Killed(BaseException):
    """As by SIGKILL: nothing is put right on the way out."""


@pytest.mark.parametrize("renames", [True, False])
def test_a_kill_while_an_old_one_is_deleted_leaves_none_that_is_half_there(stage, monkeypatch, renames):
    real, replaced, found = shutil.rmtree, os.replace, checkpoint.latest(stage)

    def killed(path, **more):
        if Path(path).exists() and "step-00000001" in Path(path).name:
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        return real(path, **more)

    def refused(source, target):
        if Path(source).name == "step-00000001":
            raise OSError(errno.EXDEV, "no renames of folders")
        return replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        if not renames:
            patch.setattr(checkpoint.os, "replace", refused)
        with pytest.raises(Killed):
            checkpoint.save(stage, 3, {"model": found.tensors("model")}, {"nimg": 3, "done": False})
    whole = checkpoint.steps(stage)
    if not renames:  # what has no manifest is none
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            checkpoint.sized(checkpoint.folder_of(stage, whole.pop(0)))
    assert whole == [2, 3] and all(checkpoint.verify(checkpoint.folder_of(stage, step)) for step in whole)
    debris.clear(stage.parent)
    assert not list((stage / "checkpoints").glob(".tmp-*"))


def test_where_folders_are_not_renamed_the_manifest_comes_last(stage, monkeypatch):
    """A kill in between leaves what the next start clears away; one after it a checkpoint."""
    real, at = os.replace, [99]

    def refuses(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if Path(target).parent.name == "step-00000003":
            at[0] -= 1
            if at[0] == 0:
                raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    for killed in (1, 2, 3):
        at[0] = killed
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(stage, 3, {n: {"w": torch.zeros(2)} for n in ("model", "ema-0")}, {"done": False})
        assert checkpoint.steps(stage) == [1, 2, 3] and checkpoint.newest(stage).manifest["step"] == 2
        debris.clear(stage.parent)
        assert checkpoint.steps(stage) == [1, 2]
    at[0] = 99
    checkpoint.save(stage, 3, {"model": {"w": torch.zeros(2)}}, {"done": False})
    assert checkpoint.steps(stage) == [2, 3] and checkpoint.latest(stage).manifest["step"] == 3
    assert sorted(p.name for p in checkpoint.folder_of(stage, 3).iterdir()) == ["manifest.json", "model.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_are_for_those_who_may_read_the_rest(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(2)}}, {"done": False})
    finally:
        os.umask(before)
    assert {f.name: stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {
        name: 0o666 & ~umask for name in ("manifest.json", "model.safetensors")
    }


def test_only_the_newest_are_kept(stage):
    for step in (3, 4, 5):
        checkpoint.save(stage, step, {"model": {"w": torch.zeros(2)}}, {"done": False})
    assert checkpoint.steps(stage) == [4, 5]


def test_what_kernels_proved_is_stored_with_a_run(tmp_path, monkeypatch):
    """A launch that fell back to plain torch is named in every checkpoint after it."""
    said = {"attention forward T77 H2 d72 bfloat16": "attention forward T77 H2 d72 bfloat16: plain torch computes it"}
    monkeypatch.setattr(proof, "_lines", dict(said))
    loop.train(Workspace(tiny(), tmp_path), ["pre"])
    assert checkpoint.latest(tmp_path / "pre").manifest["proofs"] == said
