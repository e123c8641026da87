"""What a recipe is told of its mid-training: only what was measured, and only what was told apart or costs less."""

from __future__ import annotations

import pytest

from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.cost import advice

POINTS = "mid.trajectories.per_trajectory"


def row(ratio: list[float], forwards: float, advised=4, other=16, key: str = POINTS) -> dict:
    """The advised value costs 100 forwards."""
    arms = [{"value": other, "forwards": forwards, "ratio": ratio}]
    return {"suite": "digits", "objective": "ect", "path": "ve", "question": "points", "key": key, "seeds": 3,
            "advised": advised, "forwards": 100, "arms": arms}  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "forwards", "told"),
    [
        ([0.5, 0.45, 0.55], 50, "0.5 times the distance [0.45, 0.55] at 2 times the forwards"),
        ([1.0, 0.8, 1.2], 200, "1 times the distance [0.8, 1.2] at 0.5 times the forwards"),
        ([0.9, 0.7, 1.1], 102, None),  # neither nearer nor cheaper by what is worth a word
    ],
)
def test_a_recipe_is_told_what_was_told_apart_or_is_cheaper(ratio, forwards, told):
    found = [row(ratio, forwards)]
    lines = advice.lines(loading.load("digits", [f"{POINTS}=16"]), found)
    assert (not lines) is (told is None)
    if told:
        (line,) = lines
        assert line == (POINTS, 4, 16, f"{told}; ect on digits, 3 seeds of a small network")
    assert advice.lines(loading.load("digits", [f"{POINTS}=4"]), found) == []  # it has it
    assert advice.lines(loading.load("digits", [f"{POINTS}=2"]), found) == []  # nothing was measured of its own value
    other = [{**found[0], "path": "linear"}]
    assert advice.lines(loading.load("digits", [f"{POINTS}=16"]), other) == []  # another path


def test_the_length_of_mid_training_is_a_share_of_both_stages():
    run = loading.load("digits")  # 12,800 of 38,400
    assert advice.own(run, advice.SHARE) == pytest.approx(1 / 3)
    found = [row([0.5, 0.4, 0.6], 100, advised=0.75, other=0.25, key=advice.SHARE)]
    assert advice.lines(run, found) == []  # a third is near neither
    between = [row([0.5, 0.4, 0.6], 100, advised=0.3, other=0.36, key=advice.SHARE)]
    assert advice.lines(run, between) == []  # as near to what is advised
    (line,) = advice.lines(loading.load("digits", ["post.images_nimg=38400"]), found)
    assert (line.key, line.value, line.was) == ("mid.images_nimg", 38_400, 12_800)


def test_a_plan_prints_it_and_takes_nothing_of_it(monkeypatch, capsys):
    monkeypatch.setattr(advice, "measured", lambda: (row([0.5, 0.45, 0.55], 50, advised=2, other=4),))
    assert main(["plan", "digits", "--hours", "1", "--gpus", "1"]) in (0, None)
    text = capsys.readouterr().out
    assert f"{POINTS}=2 (this plan's: 4): 0.5 times the distance" in text
    assert f"{POINTS}=2" not in text.partition("to train it")[2]


def test_a_change_of_the_plans_own_says_what_it_costs(monkeypatch, capsys):
    """The plan takes all points of a trajectory where hours are few; four were measured to be nearer."""
    found = (row([0.5, 0.4, 0.625], 50, advised=4, other=16),)
    assert advice.price("ve", POINTS, 4, 16, found).startswith("2 times the distance [1.6, 2.5] in ect on digits")
    assert advice.price("ve", POINTS, 16, 4, found).startswith("0.5 times the distance [0.4, 0.62]")
    assert advice.price("ve", POINTS, 4, 8, found) == "" == advice.price("linear", POINTS, 4, 16, found)
    monkeypatch.setattr(advice, "measured", lambda: found)
    assert main(["plan", "digits", "--hours", "1e-4", "--gpus", "1", "--gpu", "h100"]) in (0, None)
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(f"  {POINTS}=16 (")]
    assert line.endswith("; 2 times the distance [1.6, 2.5] in ect on digits, 3 seeds of a small network")


def test_what_comes_with_the_package_fits_every_recipe():
    for found in advice.measured():
        assert {"suite", "objective", "path", "key", "advised", "arms"} <= found.keys()
    for recipe in ("digits", "digits-mf", "imagenet512-dit"):
        for line in advice.lines(loading.load(recipe)):
            assert line.value != line.was
