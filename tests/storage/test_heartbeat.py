"""A clock that goes back: the age of a heartbeat, what a meter counts, and what is said of both."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

from cmt_fast.runtime import pace, words
from cmt_fast.storage import files, heartbeat
from cmt_fast.usage.meters import Meter


def test_a_beat_ahead_of_the_clock_is_as_old_as_it_is_ahead(tmp_path):
    assert heartbeat.age(tmp_path) is None
    heartbeat.beat(tmp_path)
    assert 0 <= heartbeat.age(tmp_path) < 60
    os.utime(tmp_path / heartbeat.HEARTBEAT, (time.time() + 7200,) * 2)  # the clock was put back, and the run died
    assert heartbeat.age(tmp_path) > heartbeat.DEAD_S
    heartbeat.beat(tmp_path)  # or it lives
    assert 0 <= heartbeat.age(tmp_path) < heartbeat.QUIET_S


def test_a_run_whose_server_has_another_clock_is_not_taken_for_dead(tmp_path, monkeypatch):
    """What takes a run away asks the clock by which its files have their times."""
    heartbeat.beat(tmp_path)
    now = time.time()
    for skew in (-400.0, 400.0):
        monkeypatch.setattr(time, "time", lambda skew=skew: now + skew)
        assert heartbeat.age(tmp_path) > heartbeat.QUIET_S
        assert heartbeat.age(tmp_path, files.clock(tmp_path)) < heartbeat.QUIET_S
    assert [p.name for p in tmp_path.iterdir()] == [heartbeat.HEARTBEAT]
    assert files.clock(tmp_path / "none") == time.time()


def test_what_waits_beats_for_the_run_it_is_in(tmp_path):
    heartbeat.beat(tmp_path)
    os.utime(tmp_path / heartbeat.HEARTBEAT, (0, 0))
    heartbeat.beat_above(tmp_path / "pre" / "snapshots" / "ema-0")
    assert heartbeat.age(tmp_path) < 60
    heartbeat.beat_above(tmp_path.parent / "another" / "pre")


def test_time_that_is_spent_comes_from_a_clock_that_only_goes_forward():
    seconds, now = iter([0.0, 10.0, 25.0]), iter([1000.0, 400.0, 100.0])  # the wall clock jumps back, twice
    meter = Meter("core", 2, SimpleNamespace(read=lambda: None), clock=lambda: next(seconds), now=lambda: next(now))
    assert [meter.lap("train"), meter.lap("train")] == [10.0, 15.0]
    assert words.about(-5.0) == "0 s"
    assert pace.Pace(0, 10, lambda n: 0).left_s is None
