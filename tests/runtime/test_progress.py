"""What a person sees while it runs: pace and what is left by a clock of ours, lines in a log, the two lines of a terminal."""

from __future__ import annotations

import io
import os
import re
import sys
import time

import pytest
from rich.console import Console

from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import pace, progress, words

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
LINE = (
    STAMP + r" +pre step +(?P<step>[\d,]+)/1,000 +(?P<percent>\d+) %(?:  took .+?)? +(?P<images>[\d,]+) images  "
    r"loss (?P<loss>[\d.]+) +(?P<speed>[\d,.]+) img/s(?:  ETA ~(?P<eta>.+?))?  (?P<spent>[\d.]+) GPU-h spent"
    r"(?:, ~(?P<left>[\d.]+) left)?$"
)


class Time:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    monkeypatch.setattr(progress, "_every_s", None)


# ------------------------------------------------------------------------------------------------ arithmetic


def test_the_first_step_is_not_in_the_pace():
    clock = Time()
    p = pace.Pace(0, 1000, clock=clock)
    for step, clock.now in ((1, 50.0), (2, 52.0), (3, 54.0)):
        p.at(step)
        assert (p.per_s is None) == (step == 1) and (p.left_s is None) == (step == 1)
    assert p.per_s == 0.5 and p.left_s == 997 / 0.5


def test_the_pace_is_of_the_last_minutes():
    """A machine that slows to a fifth: once the window has gone by, only the slow steps count."""
    clock = Time()
    p = pace.Pace(0, 10**6, clock=clock)
    for step in range(1, 10_001):
        clock.now += 0.1 if step <= 5000 else 0.5
        p.at(step)
    assert p.per_s == pytest.approx(2.0) and len(p._marks) <= 2 * pace.WINDOW_S + 2


def test_pauses_are_in_no_step_and_in_what_is_left():
    clock = Time()
    p = pace.Pace(100, 200, pauses=lambda n: (200 - n) // 50, clock=clock)
    p.at(101)
    clock.now = 9.0
    p.at(110)
    clock.now += 40.0
    p.pause(30.0)
    p.pause(10.0)  # two, of 20 s each
    assert p.per_s == 1.0
    p.at(111)  # its step took no time of its own
    assert p.left_s == 89 / (10 / 9.0) + 1 * 20.0


DURATIONS = {
    0.4: "0 s",
    59.4: "59 s",
    59.6: "1 min 00 s",
    3599.6: "1 h 00 min",
    8040: "2 h 14 min",
    86399: "1 d 00 h",
    273_600: "3 d 04 h",
}


@pytest.mark.parametrize("seconds, text", DURATIONS.items())
def test_durations_have_two_units(seconds, text):
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    "h, text", [(0.0, "0"), (0.0002, "0.0002"), (0.0031, "0.003"), (0.523, "0.52"), (3.14, "3.1"), (1234.5, "1,234")]
)
def test_hours_have_two_digits(h, text):
    assert words.hours(h) == text


# ------------------------------------------------------------------------------------------------ lines


def lines(capsys) -> list[re.Match]:
    out = capsys.readouterr().out.splitlines()
    found = [re.match(LINE, line) for line in out]
    assert all(found), out
    return found


def trained(clock, tmp_path, steps, seconds, losses=None):
    """A stage of 1,000 steps of 32 images that takes `steps` of them, and what it read."""
    read = []
    with progress.Stage("pre", 0, 1000, 32, tmp_path, unit="gpu", clock=clock, pauses=lambda n: 0) as shown:
        for n in range(1, steps + 1):
            clock.now += seconds
            if n == 1:
                shown.spent(1.5, 8)
            shown.step(n, lambda n=n: read.append(n) or 0.25)
    return read


def test_lines_come_by_the_clock_and_a_loss_is_read_for_them_alone(tmp_path, capsys):
    """An eighth of a second a step: a line after a second of them, then one a minute unless the end is near, and the last."""
    read = trained(Time(), tmp_path, 1000, 0.125)
    found = lines(capsys)
    assert [int(m["step"].replace(",", "")) for m in found] == [9, 489, 1000] and read == [9, 489]
    first, last = found[0], found[-1]
    assert (first["speed"], first["eta"], first["images"]) == ("256", "2 min 04 s", "288")
    # 8 devices: a second since the bill, 991 / 8 s to go
    assert (first["spent"], first["left"]) == ("1.5", f"{991 / 8 * 8 / 3600:.2f}")
    assert last["percent"] == "100" and last["left"] is None


def test_slow_steps_have_a_line_each_and_none_is_promised_before_two(tmp_path, capsys):
    trained(Time(), tmp_path, 3, 100.0)
    assert [m["step"] for m in lines(capsys)] == ["2", "3"]  # the stage did not end: no last line


def test_other_ranks_say_nothing_and_read_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert trained(Time(), tmp_path, 1000, 10.0) == []
    with progress.phase("evaluating", 10) as advance:
        advance(1)
    progress.told("pre", "a line")
    assert capsys.readouterr() == ("", "")


def test_a_phase_that_lasts_says_what_it_is_how_far_and_how_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LASTS_S", 0.1)
    monkeypatch.setenv(progress.VARIABLE, "0.2")
    heart = tmp_path / "heartbeat"
    heart.touch()
    os.utime(heart, (0, 0))
    with (
        progress.Stage("pre", 0, 10, 1, tmp_path) as shown,
        shown.pause("evaluating, 40 samples"),
        progress.counting("1 step", 40, tmp_path, quiet=True) as advance,
    ):
        advance(8)
        os.utime(heart, (0, 0))
        time.sleep(0.8)
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(STAMP + r" +pre evaluating, 40 samples  8/40", out[0])
    assert re.fullmatch(STAMP + r" +pre evaluating, 40 samples  \d s so far  8/40", out[1])
    assert re.fullmatch(STAMP + r" +pre evaluating, 40 samples: took \d s", out[-1])
    assert heart.stat().st_mtime > 0 and shown.pace.seen == 1 and shown.pace.paused > 0.7


def test_a_short_phase_says_nothing(capsys):
    with progress.phase("reading the data"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["0", "-3", "soon", "inf", "nan"])
def test_seconds_between_lines_are_a_number_above_0(text, monkeypatch):
    with pytest.raises(ConfigError, match=f"--log-every-s: '{text}' is not a number of seconds above 0"):
        progress.set_every_s(text)
    monkeypatch.setenv(progress.VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{progress.VARIABLE}: '{text}'"):
        progress.set_every_s(None)


# ------------------------------------------------------------------------------------------------ a terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_a_terminal_has_two_lines_that_fit(width, tmp_path, monkeypatch):
    """What there is no room for is left out whole, from the end; the bar is told from its rest without colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    clock = Time()
    with progress.Stage("pre", 0, 1500, 32, tmp_path, clock=clock) as shown:
        shown.spent(0.5, 1)
        for n in range(1, 384):
            clock.now += 0.1
            shown.step(n, lambda: 64.31)
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(shown.display)
        out = console.file.getvalue().splitlines()
    assert len(out) == 2 and max(map(len, out)) <= width
    assert out[0].startswith("     pre ") and "loss 64.31" in out[1]
    if width >= 80:
        assert "━─" in out[0] and "step   383/1,500   25 %  ETA ~1 min 52 s" in out[0]
        assert out[1].endswith("loss 64.31  320 img/s  0.51 core-h spent, ~0.031 left  12,256 images")
    assert "\x1b" in sys.stdout.getvalue()  # drawn over


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_be_drawn_on_has_lines(term, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal())
    trained(Time(), tmp_path, 1000, 0.125)
    found = sys.stdout.getvalue()
    assert "\x1b" not in found and all(re.match(LINE, line) for line in found.splitlines()) and found.count("\n") == 3
