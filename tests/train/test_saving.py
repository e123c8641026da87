"""Saves beside the steps, and starts from what was saved: no step waits, nothing damaged is trained from."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from cmt_fast import engine as engines
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, memory
from cmt_fast.storage import checkpoint, files, metrics_log, tensor_file
from cmt_fast.train import loop, saving
from cmt_fast.train.saving import Saver
from tests.fixtures.tiny import metrics, tiny
from tests.train.test_resume import assert_equal_stage

SHORT = [f"{stage}.images_nimg=256" for stage in ("pre", "mid")] + [
    f"{s}.checkpoint_every_nimg=64" for s in ("pre", "mid")
]
EMA = ["pre.ema=[{kind: power, sigma_rel: 0.1}]", "pre.snapshot_every_nimg=64"]


def work(folder: Path, *more: str) -> Workspace:
    return Workspace(tiny("digits", *SHORT, *more), folder)


@pytest.fixture(scope="module")
def waited(tmp_path_factory) -> Path:
    """A run whose steps waited for every save."""
    folder = tmp_path_factory.mktemp("waited") / "run"
    loop.train(work(folder, *EMA, "saves=waiting"), ["pre", "mid"])
    return folder


def steps_of(monkeypatch, at, call) -> None:
    """Call it when a local engine is about to take step `at`."""
    real = engines.LocalEngine.step

    def step(engine, lr):
        if engine.step_count + 1 == at:
            call()
        return real(engine, lr)

    monkeypatch.setattr(engines.LocalEngine, "step", step)


def test_steps_go_on_while_a_checkpoint_of_their_past_is_written(waited, tmp_path, monkeypatch):
    """The disk answers two steps after the save: what is written is the state of the save, and the EMA before it."""
    free, wrote, real = threading.Event(), [], tensor_file.write

    def slow(path, *rest):
        assert free.wait(60), "a step waited for the disk"
        wrote.append(path.parent.parent.parent.name)
        return real(path, *rest)

    monkeypatch.setattr(tensor_file, "write", slow)
    steps_of(monkeypatch, 4, lambda: (free.set(), wrote.append("step 4")))
    loop.train(work(tmp_path / "run", *EMA), ["pre"])
    assert wrote[:2] == ["step 4", "ema-0"] and wrote[2] == "pre"
    for kind in ("checkpoints", "snapshots/ema-0/checkpoints"):
        every = [sorted((folder / "pre" / kind).glob("step-*")) for folder in (tmp_path / "run", waited)]
        files = [[checkpoint.verify(f).manifest["files"] for f in folders] for folders in every]
        assert files[0] == files[1] and len(files[0]) == (2 if kind == "checkpoints" else 4)
    assert metrics(tmp_path / "run" / "pre") == metrics(waited / "pre")


def test_a_disk_that_refuses_beside_the_steps_ends_the_run_and_leaves_the_old_one(tmp_path, monkeypatch):
    real = tensor_file.write

    def refuses(path, *rest):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *rest)

    monkeypatch.setattr(tensor_file, "write", refuses)
    with pytest.raises(OSError, match="No space left") as raised:
        loop.train(work(tmp_path), ["pre"])
    assert str(raised.value.filename).endswith("model.safetensors")
    assert checkpoint.steps(tmp_path / "pre") == [2] and not list((tmp_path / "pre/checkpoints").glob(".tmp*"))


@pytest.fixture
def full(monkeypatch):
    """A disk that has no room for a checkpoint of step 4, until `room` is set; and the files that it refused."""
    room, looks, real = threading.Event(), [], tensor_file.write

    def write(path, *rest):
        if "step-00000004" in str(path) and path.parents[2].name == "pre" and not room.is_set():
            looks.append(path)
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *rest)

    monkeypatch.setattr(tensor_file, "write", write)
    monkeypatch.setattr(saving, "AGAIN_S", 0.02)
    monkeypatch.setattr(saving, "_wait_s", 60.0)
    return room, looks


@pytest.mark.parametrize("saves", ["beside", "waiting"])
def test_a_save_that_does_not_fit_waits_for_room_and_the_run_ends_as_it_would(
    waited, tmp_path, full, saves, capsys, monkeypatch
):
    room, looks = full
    real = Saver._pause
    monkeypatch.setattr(Saver, "_pause", lambda *given: (real(*given), len(looks) > 2 and room.set()))
    loop.train(work(tmp_path / "run", *EMA, *(["saves=waiting"] if saves == "waiting" else [])), ["pre"])
    assert_equal_stage(tmp_path / "run" / "pre", waited / "pre")
    said = capsys.readouterr()
    assert len(looks) == 3 and said.err.count("does not fit") == 1 and "there is room again" in said.out
    needed = re.search(r"it needs ([\d,]+) bytes, ([\d,]+) are free; tried again every 0.02 s for 1 min 00 s", said.err)
    folder = checkpoint.folder_of(waited / "pre", 8)
    assert needed and int(needed[1].replace(",", "")) == pytest.approx(_bytes(folder), rel=0.25)
    assert int(needed[1].replace(",", "")) > _bytes(folder)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_who_is_asked_to_stop_does_not_wait_for_room(tmp_path, full, monkeypatch):
    room, looks = full
    monkeypatch.setattr(loop, "noted", lambda: contextlib.nullcontext(asked))
    asked, real = [], Saver._pause
    monkeypatch.setattr(Saver, "_pause", lambda *given: (asked.append(15), real(*given)))
    with pytest.raises(files.DiskFull) as raised:
        loop.train(work(tmp_path), ["pre"])
    assert len(looks) == 2 and raised.value.needed > 10_000 and raised.value.free > 0
    assert checkpoint.steps(tmp_path / "pre") == [2] and not list(tmp_path.rglob(".tmp*"))


@pytest.mark.parametrize(
    "text, seconds", [("0", 0), ("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200), ("1d", 86400)]
)
def test_the_time_to_wait_for_room(text, seconds):
    """It ends with its command: what the same process does afterwards does not wait."""
    with saving.patience(text):
        assert saving._wait_s == seconds
    assert saving._wait_s == 0.0
    for wrong in ("", "m", "-1", "1w", "inf", "nan"):
        with pytest.raises(ConfigError, match="--disk-wait: .* is no time"), saving.patience(wrong):
            pass


def test_rows_that_found_no_room_are_in_the_checkpoint_and_come_back(waited, tmp_path, monkeypatch, capsys):
    """The log's disk is full from step 3 on, and the process is killed: who goes on, with room, has every row once."""

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    real, out = metrics_log.Late.write, tmp_path / "run"

    def write(late):
        if late.file and len(late.name) and b'"step":4' in b"".join(late.lines) and not late.file.closed:
            return late._tell(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return real(late)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(metrics_log.Late, "write", write)
        steps_of(patch, 7, die)
        loop.train(work(out, *EMA), ["pre"])
    assert [row["step"] for row in metrics(out / "pre")][-1] < 4 and checkpoint.steps(out / "pre") == [4, 6]
    assert len(checkpoint.latest(out / "pre").manifest["unwritten"]) >= 2
    assert "rows wait in memory" in capsys.readouterr().err
    loop.train(work(out, *EMA), ["pre"])
    assert_equal_stage(out / "pre", waited / "pre")


def test_rows_of_a_checkpoint_that_found_room_before_a_look_come_once(tmp_path):
    """The last checkpoint comes before its look: it keeps two rows, they get room, and the look's row follows them."""
    (tmp_path / "pre").mkdir()
    log = metrics_log.Log(tmp_path / "pre", 0, True)
    for kind, step in (("train", 1), ("train", 2), ("eval", 2), ("failed", 2)):
        log.row(kind, step, step, {})
    log.close()
    lines = (tmp_path / "pre" / metrics_log.METRICS).read_text("utf-8").splitlines(keepends=True)
    metrics_log.settle(tmp_path / "pre", {"step": 2, "unwritten": lines[:2]})
    assert (tmp_path / "pre" / metrics_log.METRICS).read_text("utf-8") == "".join(lines)
    (tmp_path / "pre" / metrics_log.METRICS).write_text(lines[0] + lines[1][:9])
    metrics_log.settle(tmp_path / "pre", {"step": 2, "unwritten": lines[:2]})
    assert (tmp_path / "pre" / metrics_log.METRICS).read_text("utf-8") == "".join(lines[:2])


def test_what_is_no_error_of_the_disk_ends_a_save_too(tmp_path, monkeypatch):
    """The first rank alone writes: whatever it raises, the others hear of it."""
    monkeypatch.setattr(checkpoint, "signed", lambda body: {}["x"])
    heard, real = [], distributed.largest
    monkeypatch.setattr(distributed, "largest", lambda n: heard.append(n) or real(n))
    with pytest.raises(KeyError):
        loop.train(work(tmp_path), ["pre"])
    assert 1 in heard and not list(tmp_path.rglob(".tmp*"))


def test_without_room_for_a_copy_the_steps_wait_and_the_run_says_so(waited, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "room", lambda: 10_000)
    monkeypatch.setattr(engines.LocalEngine, "snapshot", lambda *_: pytest.fail("there is no room"))
    loop.train(work(tmp_path / "run", *EMA), ["pre"])
    assert capsys.readouterr().out.count("saves are waited for: a copy takes") == 1
    assert_equal_stage(tmp_path / "run" / "pre", waited / "pre")


def test_pinned_memory_that_torch_keeps_is_room_for_the_next_copy(tmp_path, monkeypatch):
    """The system counts it as taken: without it every save but the first would be waited for."""
    loop.train(run := work(tmp_path), ["pre"])
    stage = run.stage("pre")
    saver = Saver(run.engine_of(stage, 1, run.sharding_plan(stage)), "pre")
    monkeypatch.setattr(memory, "room", lambda: 10_000)
    assert not saver._fits()
    monkeypatch.setattr(saving.snapshot, "kept_bytes", lambda: saver.engine.snapshot_bytes() * 2)
    assert saver._fits()
    monkeypatch.setenv("LOCAL_SIZE", "8")  # as the deepspeed launcher says how many share a host
    assert distributed.local_size() == 8


def test_rows_are_on_disk_before_the_checkpoint_that_vouches_for_them(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(_name(file)), sync(file))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(f"{Path(b).parent.name}/{Path(b).name}"), replace(a, b))[1]
    )
    loop.train(work(tmp_path), ["pre"])
    for step in (2, 4, 6, 8):
        rows = metrics(tmp_path / "pre")
        vouched = order.index(f"checkpoints/step-{step:08d}")
        assert order[:vouched].count("metrics.jsonl") >= step // 2
        assert any(row["step"] == step for row in rows)


def _name(file: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{file}")).name


def broken(file: Path) -> None:
    """One bit of its last tensor, and nothing that a look at sizes would see."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_damage_that_is_found_while_reading_leads_to_the_checkpoint_before(waited, tmp_path, monkeypatch, capsys):
    """Its optimizer, the last file that a resumed stage reads; the next process does not read it again."""

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        steps_of(patch, 7, die)
        loop.train(work(out, *EMA), ["pre"])
    assert checkpoint.steps(out / "pre") == [4, 6]
    broken(checkpoint.folder_of(out / "pre", 6) / "optimizer.safetensors")
    loop.train(work(out, *EMA), ["pre"])
    said = capsys.readouterr()
    assert "passed over" in said.err and "optimizer.safetensors: does not match its checksum" in said.err
    assert "resumes at step 4 of 8" in said.out and "resumes at step 6" not in said.out
    assert_equal_stage(out / "pre", waited / "pre")


def test_a_parent_that_is_damaged_is_trained_to_its_end_again(waited, tmp_path, capsys):
    """Found by the stage that starts from it. Alone that stage asks for its parent, and says so again in the next process."""
    out = tmp_path / "run"
    shutil.copytree(waited, out)
    shutil.rmtree(out / "mid")
    broken(checkpoint.folder_of(out / "pre", 8) / "ema-0.safetensors")
    with pytest.raises(ConfigError, match="pre: .* is not finished \\(step 6\\); train it first"):
        loop.train(work(out, *EMA), ["mid"])
    assert checkpoint.steps(out / "pre") == [6]  # for a process that has read nothing
    loop.train(work(out, *EMA), ["pre", "mid"])
    for stage in ("pre", "mid"):
        assert_equal_stage(out / stage, waited / stage)


def test_the_only_checkpoint_of_a_stage_is_not_set_aside(waited, tmp_path):
    """Its stage would begin anew from nothing, and cut its record of metrics."""
    out = tmp_path / "run"
    shutil.copytree(waited / "pre", out / "pre")
    shutil.rmtree(checkpoint.folder_of(out / "pre", 6))
    broken(checkpoint.folder_of(out / "pre", 8) / "ema-0.safetensors")
    rows = metrics(out / "pre")
    for _ in range(2):
        with pytest.raises(ConfigError, match="none of its 1 checkpoints is whole"):
            loop.train(work(out, *EMA), ["mid"])
        with pytest.raises(checkpoint.CheckpointError, match="of its 1 checkpoints is whole; move .*pre away"):
            loop.train(work(out, *EMA), ["pre", "mid"])
    assert metrics(out / "pre") == rows and checkpoint.steps(out / "pre") == [8]


def test_what_a_killed_save_left_goes_when_the_stage_goes_on(waited, tmp_path):
    shutil.copytree(waited / "pre", tmp_path / "pre")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "pre", 8))
    left = tmp_path / "pre" / "checkpoints" / ".tmp-step-00000008-1"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    loop.train(work(tmp_path, *EMA), ["pre"])
    assert not left.exists() and checkpoint.steps(tmp_path / "pre") == [6, 8]


def test_a_start_reads_what_it_needs_once(waited, tmp_path):
    """A stage that begins reads its parent's EMA, as weights and as teacher; what is finished is not read at all."""
    for file in waited.rglob("*.safetensors"):
        os.utime(file, (1e9, 1e9))
    folder = checkpoint.folder_of(waited / "pre", 8)
    before = tensor_file.read_bytes
    loop.train(work(waited, *EMA), ["pre", "mid"])
    assert tensor_file.read_bytes == before  # both are finished
    shutil.copytree(waited / "pre", tmp_path / "pre")
    loop.train(work(tmp_path, *EMA, "mid.images_nimg=32", "mid.grid_every_nimg=null"), ["mid"])
    size = (folder / "ema-0.safetensors").stat().st_size
    assert tensor_file.read_bytes - before == 2 * size  # start and teacher, which draws the grid at the end too


def test_the_room_of_a_host_is_that_of_its_control_group(tmp_path, monkeypatch):
    whole = memory.room()
    assert 0 < whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in (
        ("max", "1000000"),
        ("current", "400000"),
        ("stat", "anon 7\ninactive_file 90000\nactive_file 10000"),
    ):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert memory.room() == 700_000  # pages of files are given back
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.room() > 700_000
