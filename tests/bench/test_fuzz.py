"""Readers of foreign files against hypothesis: a small sample of `python -m bench fuzz`, and every case that found a fault."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.safety import fuzz, guard, seeds, targets
from cmt_fast.safe_pickle import sandbox

SLOW = {"config": 10, "words": 10, "header": 10}  # a recipe takes 10 ms to be read
DAMAGE = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 4), st.integers(0, 255)), max_size=4)


@pytest.fixture
def place(monkeypatch):
    """What has a process of its own is read here, under the hook; the folder that may be written is in memory where it can be:
    most of the time went into opening files anew."""
    memory = "/dev/shm"
    where = memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder, monkeypatch.context() as patch:
        patch.setattr(sandbox, "read", targets.in_process)
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def damaged(data: bytes, how: list[tuple[int, int, int]]) -> bytes:
    """A few bytes changed, taken out, put in, or the end cut off."""
    for at, what, byte in how:
        at %= len(data) + 1
        flipped = bytes([data[at] ^ (1 << byte % 8)]) if at < len(data) else b""
        new = bytes([byte])
        put, rest = ((new, at + 1), (new, at), (b"", at + byte), (flipped, at + 1), (b"", len(data)))[what]
        data = data[:at] + put + data[rest:]
    return data


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_a_damaged_file_is_read_or_refused_in_one_line_and_does_nothing(name, place):
    begin = targets.TARGETS[name].begin()
    count = SLOW.get(name, 40)

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(begin), DAMAGE)
    def holds(data, how):
        targets.check(name, place, damaged(data, how))

    holds()
    assert not all(targets.check(name, place, data) for data in begin[:4])  # it is no reader that refuses all


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_what_found_a_fault_once_does_so_no_more(name, place):
    for case, data in seeds.kept(name).items():
        assert targets.check(name, place, data), case


def test_the_seeds_of_every_target_are_of_one_that_is_there():
    assert {p.name for p in seeds.KEPT.iterdir()} <= set(targets.TARGETS)
    assert sum(len(seeds.kept(name)) for name in targets.TARGETS) >= 30


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: eval("1 + 1"),
        lambda folder: exec(compile("1", str(folder / "x.py"), "exec")),
        lambda folder: open(folder.parent / "outside", "w"),  # noqa: SIM115
        lambda folder: os.open(folder.parent / "outside", os.O_WRONLY | os.O_CREAT),
        lambda folder: os.remove(folder.parent / "outside"),
        lambda folder: os.mkdir(folder.parent / "outside"),
        lambda folder: socket.socket().connect(("127.0.0.1", 9)),
        lambda folder: subprocess.run(["true"]),
        lambda folder: os.system("true"),
        lambda folder: __import__(guard.CANARY),
    ],
)
def test_the_guard_sees_what_is_more_than_reading(act, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(guard.Forbidden), guard.watched(inner):
        act(inner)
    with pytest.raises(guard.Forbidden), guard.watched(inner), contextlib.suppress(BaseException):
        act(inner)  # nor can it be caught on the way
    assert list(tmp_path.iterdir()) == [inner]
    with guard.watched(inner):
        (inner / "a").write_bytes(b"x")


def test_a_fault_is_found(place, monkeypatch):
    """A reader that raises what it does not declare, and one whose line would act on a terminal."""
    for error in (KeyError("x"), targets.ConfigError("a"), ValueError("\x1b[31m")):
        reader = targets.Target(
            lambda folder, data, error=error: (_ for _ in ()).throw(error), (ValueError,), lambda: [b""]
        )
        monkeypatch.setitem(targets.TARGETS, "words", reader)
        if isinstance(error, targets.ConfigError):
            assert targets.check("words", place, b"") == "a"
        else:
            with pytest.raises((KeyError, targets.Undeclared)):
                targets.check("words", place, b"")


def test_executions_add_up_with_the_commit(tmp_path):
    state = {"executions": 5, "read": 2, "refused": 3, "seconds": 1.0, "cpu_seconds": 1.0, "faults": {"x": {}}}
    row = fuzz.added({}, "words", state, {"commit": "a"})
    row = fuzz.added(row, "words", state, {"commit": "b"})
    assert row["executions"] == 10 and row["commits"] == {"a": 5, "b": 5} and row["calls"] == 2 and row["faults"] == 2
    fuzz.write(tmp_path / "fuzz.json", {"commit": "b"}, [row], [{"commit": "a"}])
    text = (tmp_path / "fuzz.json").read_text("utf-8")
    assert '"executions": "10"' in text and '"faults_of_this_commit": "0"' in text
