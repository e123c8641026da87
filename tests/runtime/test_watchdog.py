"""What ends a group of ranks, and what does not: the watchdog's thread by hand, on a store in memory."""

from __future__ import annotations

import threading
import time
import types

import pytest
import torch.distributed as dist

from cmt_fast.runtime import distributed, exits, watchdog
from cmt_fast.runtime.watchdog import Watchdog, _Wait

LIMIT_S = 1800.0


class Left(Exception):
    """A process that ended itself."""


class Store(dist.HashStore):
    def clone(self):
        return self


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """Two ranks, whose beats are this test's; what ends one raises Left in its place."""

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout: None)
    slept = [0.0]  # what is waited for stacks is not waited here
    clock = types.SimpleNamespace(**vars(time))
    clock.sleep = lambda s: slept.__setitem__(0, slept[0] + s)
    clock.monotonic = lambda: time.monotonic() + slept[0]
    monkeypatch.setattr(watchdog, "time", clock)
    store = Store()
    return [Watchdog(store, rank, 2, LIMIT_S) for rank in range(2)]


def seconds_to_the_end(
    dog: Watchdog, other: Watchdog | None, most_s: float, wait: _Wait | None = None, limited: bool = True
) -> float | None:
    """How long it waits in one call until it ends its process, None for at least most_s; other: who beats meanwhile."""
    wait, beats = wait or _Wait(), _Wait()
    with dog.waiting(limited):
        for n in range(int(most_s / dog.every_s)):
            if other:
                other._tick(beats, other.every_s)
            try:
                dog._tick(wait, dog.every_s)
            except Left:
                return n * dog.every_s
    return None


def test_who_waits_for_a_rank_that_beats_waits_until_the_timeout(pair, capsys):
    """As for one that saves, compiles or evaluates alone: its thread beats whatever its main thread is in."""
    first, second = pair
    assert seconds_to_the_end(second, first, 0.8 * LIMIT_S) is None
    assert seconds_to_the_end(second, first, 2 * LIMIT_S) == pytest.approx(watchdog.SHARE * LIMIT_S, abs=5)
    assert "has waited for 1622 s (timeout_s 1800)" in capsys.readouterr().err


def test_who_meets_waits_for_ever_for_a_rank_that_lives_and_not_for_a_dead_one(pair):
    first, second = pair
    assert seconds_to_the_end(second, first, 3 * LIMIT_S, limited=False) is None
    assert seconds_to_the_end(second, None, LIMIT_S, limited=False)


def test_where_all_would_end_their_processes_one_says_why(pair, capsys):
    first, second = pair
    for dog in pair:
        dog._ended.set()
        with pytest.raises(Left):
            dog.cry("a reason")
    assert capsys.readouterr().err.count("a reason") == 1


def test_a_rank_that_does_not_beat_is_given_up(pair, capsys, tmp_path):
    first, second = pair
    second.place(tmp_path)
    first._tick(_Wait(), first.every_s)
    assert 60 <= (seconds_to_the_end(second, None, LIMIT_S) or 0) <= 100
    assert "rank 0 gave no sign of life for 60 s; stacks of rank 1 in" in capsys.readouterr().err
    assert "seconds_to_the_end" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    second.place(tmp_path)  # of the process that is started again: what was not read yet stays
    assert "seconds_to_the_end" in (tmp_path / "stacks" / "rank-1-before.txt").read_text()
    second.end()
    assert not (tmp_path / "stacks" / "rank-1.txt").exists()


def test_short_calls_one_after_the_other_are_no_long_one(pair):
    first, second = pair
    wait = _Wait()
    first._tick(_Wait(), first.every_s)
    for _ in range(100):  # none of which the thread sees the end of
        assert seconds_to_the_end(second, None, 20.0, wait) is None


@pytest.mark.parametrize("gap_s", [120.0, 7200.0])
def test_ranks_that_were_all_stopped_go_on(pair, monkeypatch, gap_s):
    """SIGSTOP and SIGCONT of a scheduler, a machine that was paused: the clock has gone on, and nobody has beaten."""
    first, second = pair
    now, beats = [0.0], _Wait()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    class Ended:
        n = 0

        def wait(self, s):
            self.n += 1
            now[0] += gap_s if self.n % 20 == 0 else s
            if self.n % 20:  # right after a gap it is the first to go on
                first._tick(beats, s)
            return self.n > 100

    second._ended = Ended()
    with second.waiting():
        second._watch()


def test_who_asked_itself_for_stacks_is_not_ended_by_its_thread(pair):
    """The main thread, by a call that timed out: it closes what is open, and tells the error."""
    first, second = pair
    second.store.set("cmt/stuck", "1")
    assert second._tick(_Wait(), 2.0)
    first._ended.set()
    with pytest.raises(Left) as left:
        first._tick(_Wait(), 2.0)
    assert left.value.args == (exits.PEER_LOST,)


@pytest.mark.parametrize(
    "text",
    [
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "Broken pipe",
    ],
)
def test_the_launchers_store_that_is_gone_is_a_lost_process(text):
    """As rank 0 holds it where no launcher does: met by `meet` and `anyone`."""
    assert (distributed.lost(dist.DistNetworkError(text)) or "").startswith("another process died")


def test_a_call_within_what_has_no_limit_has_none_either(pair, monkeypatch):
    """As within DeepSpeed's start, which waits by a timeout of its own: for a rank that lives, and not for one that is gone."""
    first, second = pair
    monkeypatch.setattr(distributed, "_watchdog", second)
    with distributed.together():
        assert seconds_to_the_end(second, first, 2 * LIMIT_S) is None
        assert seconds_to_the_end(second, None, LIMIT_S) == pytest.approx(1.5 * watchdog.LOST_S, abs=5)
