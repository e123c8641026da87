"""What a run's folder holds is read as it was written, or one declared error says what is wrong with it, at once."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import socket
import stat
import time
import types

import pytest
import torch

from bench.safety import crashes
from cmt_fast.run import standing
from cmt_fast.storage import checkpoint, debris, files, locks, metrics_log, sound, tensor_file
from cmt_fast.storage.metrics_log import Log
from cmt_fast.storage.record import Record
from cmt_fast.train import checks, nonfinite
from cmt_fast.usage import bills, ledger
from cmt_fast.usage.bills import Amount, Usage
from tests.fixtures.tiny import tiny

TENSORS = {"model": {"w": torch.arange(4.0)}, "ema-0": {"w": torch.ones(4)}}


def save(stage, step, **about):
    return checkpoint.save(stage, step, TENSORS, {"stage": stage.name, "nimg": step, "done": True, **about})


def test_every_bit_of_a_small_file_is_held_by_its_checksum(tmp_path):
    file, body = tmp_path / "a.json", {"few": {"1": 0.5}, "n": 20, "name": "Fréchet"}
    text = sound.signed(body).encode()
    seen = 0
    for bit in range(0, 8 * len(text), 3):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = sound.read(file, signs=True)
        except sound.Unsound as error:
            assert str(error).startswith(f"{file}: ")
            seen += 1
        else:
            assert found == body and bit // 8 < text.rindex(
                b"\n"
            )  # a space that became another, and not in the checksum's name
    assert seen > 0.9 * 8 * len(text) / 3


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b"", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}"],
                         ids=["brackets", "braces", "a list", "nothing", "no text", "a long number"])  # fmt: skip
def test_json_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(sound.Unsound, match="cannot be read") as told:
        sound.read(tmp_path / "a.json")
    assert "\n" not in str(told.value)
    with pytest.raises(sound.Unsound, match="more than the 3 bytes"):
        (tmp_path / "a.json").write_bytes(b"1234")
        sound.data(tmp_path / "a.json", 3)
    with pytest.raises(FileNotFoundError):
        sound.read(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "socket", "/dev/zero"])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, kind, name):
    """Where a pipe was waited for nobody would know why a run stands still; the checkpoint before it is used."""
    save(tmp_path / "pre", 1)
    folder = save(tmp_path / "pre", 2)
    path = folder / name
    path.rename(tmp_path / "away")
    monkeypatch.chdir(folder)
    {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "away"),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(name), "/dev/zero": lambda: path.symlink_to("/dev/zero"),
    }[kind]()  # fmt: skip
    begun = time.monotonic()
    for reads in (checkpoint.verify, checkpoint.sized):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            reads(folder)
        assert checkpoint.latest(tmp_path / "pre", reads).manifest["step"] == 1
    assert time.monotonic() - begun < 5


def test_a_checkpoint_is_believed_where_it_lies(tmp_path, capsys):
    """Of another stage, under another name, with other settings: each is passed over and named, and the sound one is used."""
    pre, mid = tmp_path / "pre", tmp_path / "mid"
    save(pre, 7)
    save(mid, 3)
    shutil.copytree(checkpoint.folder_of(pre, 7), checkpoint.folder_of(mid, 7))
    with pytest.raises(checkpoint.CheckpointError, match="is of stage pre, not of mid"):
        checkpoint.sized(checkpoint.folder_of(mid, 7))
    shutil.copytree(checkpoint.folder_of(mid, 3), checkpoint.folder_of(mid, 999))
    with pytest.raises(checkpoint.CheckpointError, match="is of step 3, its folder was renamed"):
        checkpoint.sized(checkpoint.folder_of(mid, 999))
    for odd in ("step-999", "step-²", "step-", "step-00000003 (1)"):
        (mid / "checkpoints" / odd).mkdir()
    assert checkpoint.steps(mid) == [3, 7, 999] and checkpoint.complete(mid).manifest["step"] == 3
    said = capsys.readouterr().err
    assert all(
        f"passed over: {mid}/checkpoints/{name}" in said for name in ("step-999", "step-00000007", "step-00000999")
    )


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path, monkeypatch):
    """A stage that seemed to have none would begin at step 0, and its metrics be cut."""
    save(tmp_path / "pre", 1)
    real = os.listdir

    def refused(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refused)
        with pytest.raises(checkpoint.CheckpointError, match="cannot be listed"):
            checkpoint.newest(tmp_path / "pre")
    shutil.rmtree(tmp_path / "pre/checkpoints")
    assert checkpoint.newest(tmp_path / "pre") is None
    (tmp_path / "pre/checkpoints").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be listed"):
        checkpoint.newest(tmp_path / "pre")


def test_a_file_that_the_disk_does_not_give_is_passed_over(tmp_path, monkeypatch):
    save(tmp_path / "pre", 1)
    folder, real = save(tmp_path / "pre", 2), os.preadv

    def broken(handle, into, at):
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(folder)):
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, into, at)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(checkpoint.Damaged, match="Input/output error"):
        checkpoint.sized(folder).tensors("model")
    assert checkpoint.newest(tmp_path / "pre").manifest["step"] == 1
    tensor_file._hashed.clear()
    assert checkpoint.latest(tmp_path / "pre").manifest["step"] == 1


def test_manifests_name_files_beside_them_alone(tmp_path):
    folder = save(tmp_path / "pre", 1)
    body = sound.read(folder / "manifest.json")
    for change in ({"files": {"../x": {"bytes": 1, "xxh3_128": ""}}}, {"files": []}, {"step": "1"}, {"nimg": None}):
        (folder / "manifest.json").write_text(checkpoint.signed({**body, **change}))
        with pytest.raises(checkpoint.CheckpointError, match="is no manifest"):
            checkpoint.read_manifest(folder)


# ------------------------------------------------------------------------------------------------ rows and bills


def rows(stage, *steps, after=0):
    stage.mkdir(exist_ok=True)
    log = Log(stage, after, True)
    for step in steps:
        log.row("train", step, 8 * step, {"loss": 1.5, "lr": 0.1}, {"train_s": 1.0, "eval_s": 0.0})
    log.close()
    return stage / metrics_log.METRICS


def test_no_bit_of_a_row_falls_over_unseen(tmp_path):
    line = rows(tmp_path / "pre", 3).read_bytes()
    of = metrics_log.seeds(tmp_path / "pre")
    whole = metrics_log.parsed(line, of)
    assert whole and metrics_log.parsed(line, metrics_log.seeds(tmp_path / "mid")) is None
    for bit in range(8 * (len(line) - 1)):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        assert metrics_log.parsed(bytes(damaged), of) in (None, whole), bytes(damaged)


def test_a_damaged_row_is_named_and_costs_no_other(tmp_path, capsys):
    """The first case cut every row after the damaged one, the second ended in a traceback."""
    file = rows(tmp_path / "pre", 1, 2, 3, 4)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], lines[1].replace(b'"step":2', b'"step":9'), *lines[2:]]))
    assert rows(tmp_path / "pre", after=4).read_bytes().count(b"\n") == 4 and Record.of(file).lost == 1
    file.write_bytes(b"".join([*lines[:3], lines[3].replace(b"loss", b"l\xffss")]))
    rows(tmp_path / "pre", 5, after=4)
    assert list(Record.of(file).nimg) == [8, 16, 24, 40]
    assert "1 damaged row, put aside in metrics.jsonl.damaged" in capsys.readouterr().err
    assert b"l\xffss" in file.with_name("metrics.jsonl.damaged").read_bytes()
    file.write_bytes(b"".join(lines)[:-1] + b"\x0b")  # the newline is another byte
    rows(tmp_path / "pre", 5, after=4)
    assert "1 damaged row" in capsys.readouterr().err


def test_rows_without_a_checksum_and_lines_that_are_none(tmp_path):
    """A run of before goes on; what is no row is left out by every reader."""
    deep = b"[" * 100_000
    old = b'{"kind":"train","step":1,"nimg":8,"loss":1.5,"lr":0.1,"wall":{"train_s":1.0,"eval_s":0.0}}\n'
    none = [b"[1]", b"3", b'"a"', b'{"kind":"eval","step":1,"nimg":8,"steps":[1]}', b'{"kind":"train","nimg":"x"}', deep,
            b'{"kind":"train","nimg":%d,"loss":1,"lr":1,"wall":{}}' % 2**70, b'{"step":1,"nimg":2,"wall":3}']  # fmt: skip
    file = tmp_path / metrics_log.METRICS
    file.write_bytes(b"".join([old, *(line + b"\n" for line in none), old.replace(b'"step":1', b'"step":2')]))
    assert [row["step"] for row in metrics_log.rows(file)] == [1, 2]
    record = Record.of(file)
    assert list(record.nimg) == [8, 8] and record.lost == len(none) and Record.newest(file).last_nimg == 8
    file.unlink()
    os.mkfifo(file)
    assert not Record.of(file) and not Record.newest(file) and metrics_log.read(file) == []
    Log(tmp_path, 3, True).close()
    assert file.is_file() and file.with_name("metrics.jsonl.damaged").is_fifo()


def test_a_damaged_bill_is_put_aside_and_the_checkpoint_s_counts(tmp_path, capsys):
    bill = Usage({"core": {"train": Amount(5.0)}}, until=1.8e9)
    body = {"bill": bill.stored(), "settled": {"step": 1, "bill": bill.stored()}, "held": {"core": 1}}
    file = tmp_path / bills.FILE
    file.write_text(sound.signed(body))
    assert bills.journal(tmp_path) == (bill, 1, bill, {"core": 1})
    for name in ("pre", "mid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / bills.FILE).write_text(sound.signed({"stage": "pre", **body}))
    assert bills.journal(tmp_path / "pre") and bills.journal(tmp_path / "mid") is None
    changed = [file.read_text().replace("5.0", "6.0", 1)]
    for wrong in (
        {"bill": 3},
        {"held": []},
        {"settled": [1]},
        {"bill": {**bill.stored(), "amounts": {"core": {"train": {"seconds": "x"}}}}},
    ):
        changed.append(json.dumps({**body, **wrong}))
    for text in changed:
        file.write_text(text)
        assert bills.journal(tmp_path) is None
        assert ledger._journal(tmp_path, True) is None and not file.exists()
    assert "put aside as bill.json.damaged-5" in capsys.readouterr().err
    assert (
        bills.of_stage(tmp_path, {"bill": bill.stored()}) == bill
        and bills.of_stage(tmp_path, {"bill": {"amounts": 1}}) is None
    )


def test_a_pulse_is_a_time_or_nothing(tmp_path):
    file, pulse = tmp_path / bills.ALIVE, bills.pulse(1.8e9)
    for bit in range(8 * len(pulse)):
        damaged = bytearray(pulse)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert bills.alive(tmp_path) is None
    for text in (pulse, b"1800000000.000000"):  # of now, and of a version without a checksum
        file.write_bytes(text)
        assert bills.alive(tmp_path) == 1.8e9


def test_rows_of_another_stage_are_none(tmp_path, capsys):
    """Swapped between stages they were gone on with without a word; those of before, that do not say their stage, are read."""
    file = rows(tmp_path / "mid", 1, 2)
    here = rows(tmp_path / "pre", 1, 2, 3)
    shutil.copy(file, here)
    assert not Record.of(here) and Record.of(here).lost == 2 and metrics_log.read(here) == []
    assert Record.newest(here).last_nimg == 0
    rows(tmp_path / "pre", 3, after=2)
    assert "2 damaged rows, put aside" in capsys.readouterr().err and [r["step"] for r in metrics_log.rows(here)] == [3]
    shutil.copy(file, tmp_path / "copied.jsonl")
    assert len(Record.of(tmp_path / "copied.jsonl")) == 2  # looked at elsewhere
    body = '{"kind":"train","step":1,"nimg":8,"loss":1.5,"lr":0.1,"wall":{}}'
    here.write_text(f"{body}\n{metrics_log.sealed(body)}\n")
    assert len(Record.of(here)) == len(metrics_log.read(here)) == 2 and not Record.of(here).lost


def test_rows_that_a_checkpoint_vouches_for_are_missed(tmp_path, capsys):
    """A file that was cut, or whose last newline is another byte, looked like one that ends there."""
    file = rows(tmp_path / "pre", 1, 2, 3)
    log = Log(tmp_path / "pre", 3, True)
    vouched = log.commit()
    log.close()
    save(tmp_path / "pre", 3, **vouched)
    whole = file.read_bytes()
    assert vouched == {"metrics_bytes": len(whole)} and "lost" not in capsys.readouterr().err
    stage = tiny("digits").stages["pre"]
    home = types.SimpleNamespace(stages={"pre": stage})
    spoilt = lambda read: standing.of(home, tmp_path, None, "pre", read).spoilt
    for text in (whole[: len(whole) // 3], whole[:-1], whole[:-1] + b"\x0b", b""):
        file.write_bytes(text)
        assert all("bytes of its rows are lost" in spoilt(read) for read in (Record.of, Record.newest))
    Log(tmp_path / "pre", 3, True, manifest=vouched).close()
    assert f"{len(whole)} of {len(whole)} bytes of its rows are lost" in capsys.readouterr().err
    for text in (whole, whole + b'{"kind":"tr'):  # of a row after it, which is done again
        file.write_bytes(text)
        assert not spoilt(Record.of) and not spoilt(Record.newest)


def test_a_small_file_of_another_stage_is_refused(tmp_path):
    for name in ("pre", "mid", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "figures.json").write_text(sound.signed({"stage": "pre", "n": 1}))
    assert sound.read(tmp_path / "pre/figures.json")["n"] == sound.read(tmp_path / "elsewhere/figures.json")["n"] == 1
    with pytest.raises(sound.Unsound, match="is of stage pre, not of mid"):
        sound.read(tmp_path / "mid/figures.json")


def test_checksums_of_steps_survive_what_a_kill_tears(tmp_path):
    (tmp_path / "pre").mkdir()
    file, of = tmp_path / "pre" / checks.CHECKS, dict.fromkeys(("gradient", "parameters"), 5)
    log = checks.Record(tmp_path / "pre", True)
    for step in (1, 2):
        log.add(step, 1.5, of, 1)
    whole = file.read_bytes()
    assert [line["step"] for line in checks.read(tmp_path / "pre", 2)] == [2] and checks.checked(file) is None
    file.write_bytes(whole[:-9])
    log.add(3, 1.5, of, 1)
    assert [len(checks.read(tmp_path / "pre", step)) for step in (1, 2, 3)] == [1, 0, 1]
    with pytest.raises(sound.Unsound, match="1 damaged line,"):
        checks.checked(file)
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid" / checks.CHECKS).write_bytes(whole)
    assert checks.read(tmp_path / "mid", 1) == []
    file.unlink()
    os.mkfifo(file)
    log.add(4, 1.5, of, 1)
    assert checks.read(tmp_path / "pre", 4) == []


def test_rollbacks_that_are_damaged_are_those_of_the_checkpoint(tmp_path, capsys):
    """Which noise a stage goes on with was not known, and the run refused."""
    file, entry = tmp_path / "pre/nonfinite/rollbacks.json", {"step": 7, "from": 4, "redraw": 1}
    nonfinite._write(file, [entry])
    assert nonfinite.rollbacks(tmp_path / "pre", None) == [entry]
    more = [entry, {"step": 9, "from": 8, "redraw": 2}]  # of before, as a power cut or a copy brings it back
    assert nonfinite.rollbacks(tmp_path / "pre", {"nonfinite": {"rollbacks": more}}) == more
    nonfinite._write(file, more)
    assert nonfinite.rollbacks(tmp_path / "pre", {"nonfinite": {"rollbacks": [entry]}}) == more
    nonfinite._write(file, [entry])
    known = {"nonfinite": {"rollbacks": [{**entry, "redraw": 2}]}}
    file.write_text(file.read_text().replace("4", "5", 1))
    assert nonfinite.rollbacks(tmp_path / "pre", known, aside=True) == known["nonfinite"]["rollbacks"]
    assert "those that the checkpoint knows count; put aside" in capsys.readouterr().err
    assert nonfinite.rollbacks(tmp_path / "pre", None) == []


@pytest.mark.parametrize("name", locks.NAMES)
def test_a_pipe_in_the_place_of_a_lock_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"{name} is a pipe, not a file"):
        locks.take(tmp_path)


# ------------------------------------------------------------------------------------------------ what a crash leaves


def test_what_a_dead_process_left_goes_and_what_was_put_aside_stays(tmp_path):
    save(tmp_path / "pre", 1)
    stays = [
        "pre/checkpoints/.tmp-damaged-step-00000003",
        "reference/.tmp-new.json-7",
        "pre/metrics.jsonl.damaged",
        ".lock",
    ]
    goes = ["pre/checkpoints/.tmp-step-00000002-77/model.safetensors", ".tmp-run.json-9", "pre/.tmp-bill.json-9",
            "pre/snapshots/ema-0/checkpoints/.tmp-step-00000002-7/a", "mid/checkpoints/.tmp-step-00000005-7/a",
            "pre/checkpoints/step-00000001/.tmp-manifest.json-7", "extractor.tmp-77", "reference/.tmp-old.json-7"]  # fmt: skip
    (tmp_path / "mid").mkdir()  # its checkpoints are on a larger disk, where others keep things too
    (other := tmp_path / "elsewhere" / "large").mkdir(parents=True)
    (tmp_path / "mid/checkpoints").symlink_to(other)
    stays.append("mid/checkpoints/.tmp-another-7")
    for name in (*stays, *goes):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    for name in (*goes[-2:], stays[-1]):
        os.utime(tmp_path / name, (1e9, 1e9))
    gone = debris.clear(tmp_path)
    assert len(gone) == len(goes) and not any((tmp_path / name).exists() for name in goes)
    assert all((tmp_path / name).exists() for name in stays) and checkpoint.steps(tmp_path / "pre") == [1]


def test_a_crash_in_a_save_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch, capsys):
    """A sample of `python -m bench crashes`; where nothing is synced, some of the same states lose both."""
    arguments = argparse.Namespace(n=80, seed=1, json=tmp_path / "crashes.json")
    assert crashes.run(arguments) == 0
    assert json.loads(arguments.json.read_text())["states"] >= 60
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)
    assert crashes.run(argparse.Namespace(n=150, seed=1, json=tmp_path / "crashes.json")) == 1


def test_no_file_is_put_in_the_place_of_a_device(tmp_path):
    """As root `--json /dev/null` replaced the device for the whole machine."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices are made by root alone")
    with pytest.raises(OSError, match="Is a device"):
        files.write_text(device, "{}")
    assert device.is_char_device() and [p.name for p in tmp_path.iterdir()] == ["null"]
