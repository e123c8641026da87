"""One process in a folder, with flock and without: who is refused, who takes over, and what a file system refuses is seen."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cmt_fast.storage import debris, files, filesystem, locks, metrics_log
from cmt_fast.storage.locks import LEASE, LOCK, Taken


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """A file system without flock; leases are quick."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    monkeypatch.setattr(locks, "STALE_S", 0.2)
    return tmp_path


def leave(folder: Path, **other: object) -> Path:
    """A lease of somebody else."""
    (folder / LEASE).write_text(locks._body({**locks._me(), **other}))
    return folder / LEASE


def test_a_second_one_is_told_who_has_it(tmp_path):
    with locks.holding(tmp_path) as held:
        assert held.kind == "flock"
        with pytest.raises(Taken, match=f"in use by another process .pid {os.getpid()} on "):
            locks.take(tmp_path)
    with locks.holding(tmp_path, remove=True):
        pass
    assert not list(tmp_path.iterdir())


def test_without_flock_a_lease_is_the_lock_and_shows_life(refused):
    with locks.holding(refused) as held:
        assert held.kind == "lease"
        before = (refused / LEASE).read_bytes()
        with pytest.raises(Taken, match=f"pid {os.getpid()}"):
            locks.take(refused)
        assert _changes(refused / LEASE, before)
    assert not (refused / LEASE).exists()


def _changes(file: Path, before: bytes) -> bool:
    ended = threading.Event()
    return any(file.read_bytes() != before or ended.wait(0.02) for _ in range(100))


@pytest.mark.parametrize("other", [{"pid": 1 << 30}, {"started": "1"}, {"host": "elsewhere", "boot": "x"}])
def test_a_stale_lease_is_taken_over(refused, other):
    """Of a dead process here at once, also where its pid is another's now; of another machine once it was quiet."""
    leave(refused, **other)
    said = []
    locks.take(refused, said.append).close()
    assert len(said) == ("host" in other) and not list(refused.glob(f"{LEASE}*"))


def test_who_is_dead_and_nobody_waited_for_holds_nothing(refused):
    """A container without an init keeps the killed as zombies."""
    child = subprocess.Popen(["sleep", "60"])
    alive = {"pid": child.pid, "started": locks._started(child.pid)}
    leave(refused, **alive)
    with pytest.raises(Taken):
        locks.take(refused)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still there
    locks.take(refused).close()
    child.wait()


@pytest.mark.parametrize("error", [PermissionError, None])
def test_a_process_that_is_hidden_here_is_not_taken_for_dead(refused, monkeypatch, error):
    """Of another user, where /proc is mounted with hidepid: only the quiet of its lease says that it is dead."""

    def kill(pid, number):
        raise error() if error else ProcessLookupError()

    monkeypatch.setattr(os, "kill", kill)
    leave(refused, pid=1 << 30)
    said = []
    locks.take(refused, said.append).close()
    assert len(said) == bool(error)


def test_what_those_left_who_died_at_a_stale_lease_goes(refused, monkeypatch):
    for name in ("-old", "-new.tmp"):
        (refused / f"{LEASE}{name}").write_bytes(b"x")
    locks.take(refused).close()
    assert [p.name for p in refused.iterdir()] == [LOCK]


@pytest.mark.parametrize("content", [b"", b"{", b"000000000000 []\n", b"\xff" * 50])
def test_a_torn_lease_is_taken_over(refused, content):
    (refused / LEASE).write_bytes(content)
    locks.take(refused).close()


def test_a_lease_that_shows_life_is_not_taken_over(refused, monkeypatch):
    file, ended, beats = leave(refused, host="elsewhere", boot="x"), threading.Event(), iter(range(1, 10**6))
    monkeypatch.setattr(locks, "STALE_S", 30.0)
    thread = threading.Thread(target=lambda: [_write(file, next(beats)) for _ in iter(lambda: ended.wait(0.02), True)])
    thread.start()
    try:
        with pytest.raises(Taken, match="elsewhere"):
            locks.take(refused)
    finally:
        ended.set()
        thread.join()


def _write(file: Path, beat: int) -> None:
    with open(file, "r+b") as opened:
        opened.write(f"{beat:012}".encode())


def test_one_of_many_takes_a_stale_lease_over(refused):
    leave(refused, host="elsewhere", boot="x")
    got, wait = [], threading.Barrier(6)

    def want() -> None:
        wait.wait()
        try:
            got.append(locks.take(refused))
        except Taken:
            got.append(None)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [held for held in got if held]
    assert len(got) == 6 and len(winners) == 1
    winners[0].close()


def test_who_comes_late_to_a_stale_lease_leaves_the_new_one(refused, monkeypatch):
    """Another one took it over after this one had found it stale."""
    leave(refused, pid=1 << 30)
    real = locks._make

    def late(file, about):
        if file.name.startswith(f"{LEASE}-"):
            leave(refused)  # of a live process
        real(file, about)

    monkeypatch.setattr(locks, "_make", late)
    with pytest.raises(Taken):
        locks.take(refused)
    assert sorted(p.name for p in refused.iterdir()) == [LEASE, LOCK]


def test_who_lost_its_lease_writes_no_checkpoint(refused):
    with locks.holding(refused):
        locks.check(refused / "pre")
        leave(refused, host="elsewhere", token="other")
        with pytest.raises(OSError, match="taken over by another process .* on .elsewhere"):
            locks.check(refused / "pre")
        locks.check(refused.parent / "another")
    assert (refused / LEASE).exists()  # it is the other one's
    (refused / LEASE).unlink()
    with locks.holding(refused):
        (refused / LEASE).unlink()  # the other one has ended
        with pytest.raises(OSError, match="taken over"):
            locks.check(refused / "pre")


def test_who_lost_its_lease_writes_no_row_between_those_of_the_other(refused, capsys):
    (refused / "pre").mkdir()
    with locks.holding(refused):
        log = metrics_log.Log(refused / "pre", 0, True)
        log.row("train", 1, 32, {"loss": 1.0})
        leave(refused, host="elsewhere", token="other")
        log.row("train", 2, 64, {"loss": 1.0})
        log.close()
    assert [row["step"] for row in metrics_log.rows(refused / "pre" / "metrics.jsonl")] == [1]
    assert "taken over by another process" in capsys.readouterr().err


def test_a_fresh_lease_counts_where_flock_goes_too(tmp_path, monkeypatch):
    """Two machines may mount one file system with and without flock."""
    monkeypatch.setattr(locks, "STALE_S", 0.1)
    leave(tmp_path)
    with pytest.raises(Taken):
        locks.take(tmp_path)
    leave(tmp_path, pid=1 << 30)
    with locks.holding(tmp_path) as held:
        assert held.kind == "flock" and not (tmp_path / LEASE).exists()
    assert (tmp_path / LOCK).exists()


def test_what_a_file_system_refuses_is_one_line(refused, monkeypatch):
    def replace(source, target):
        if os.path.exists(target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(source, target)

    def fsync(handle):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    found = filesystem.probe(refused)
    assert not (found.flock or found.folder_sync or found.replaces_open) and found.renames_folders
    line = filesystem.line(refused, found)
    assert "no flock: a lease" in line and "no fsync of folders" in line and "in two steps" in line and "\n" not in line
    assert not list(refused.iterdir())
    files.sync(refused)  # a folder that cannot be synced is passed over, a file is not
    (refused / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(refused / "file")


def test_a_file_is_replaced_where_it_cannot_be_renamed_over(tmp_path, monkeypatch):
    def replace(source, target):
        if os.path.exists(target):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if killed and Path(target).name == "file":
            raise KeyboardInterrupt
        return real(source, target)

    real, killed = os.replace, []
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "PATIENCE_S", 0.02)
    monkeypatch.setattr(files, "_refuses", set())
    for text in ("one", "two"):
        files.write_bytes(tmp_path / "file", text.encode())
    assert (tmp_path / "file").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
    killed.append(1)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "file", b"three")
    assert not (tmp_path / "file").exists()
    killed.clear()
    debris.clear(tmp_path)
    assert (tmp_path / "file").read_text() == "two" and not list(tmp_path.glob(f"{files.OLD}*"))


def test_a_file_whose_place_is_refused_to_the_new_one_keeps_the_old(tmp_path, monkeypatch):
    """As by a quota of names: what was moved out of the way comes back."""

    def replace(source, target):
        if os.path.exists(target) or Path(source).name.startswith(".tmp-file"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "PATIENCE_S", 0.02)
    (tmp_path / "file").write_text("one")
    with pytest.raises(OSError, match="Permission denied"):
        files.write_bytes(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_slow_disk_is_not_taken_for_a_late_clock(tmp_path, monkeypatch):
    clock = iter([time.time() - 30.0, time.time() + 30.0])
    monkeypatch.setattr(filesystem.time, "time", lambda: next(clock))
    assert filesystem.probe(tmp_path).late_s == 0.0


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    def full(path, data):
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(tmp_path / "file", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
