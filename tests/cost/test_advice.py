"""What a recipe is told of its mid-training: only what was measured, and only what was told apart or costs less."""

from __future__ import annotations

import pytest

from bench.grid import questions
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


def said(run, found, question: str, **more) -> advice.Answer:
    (answer,) = [a for a in advice.answers(run, found, **more) if a.question == question]
    return answer


def test_every_question_has_an_answer_and_what_nobody_asked_says_so():
    run = loading.load("digits")
    assert [a.question for a in advice.answers(run, [])] == list(advice.ASKED) == list(questions.QUESTIONS)
    states = {a.question: a.state for a in advice.answers(run, [])}
    assert {q for q, state in states.items() if state == "unmeasured"} == {
        "points",
        "pool",
        "solver",
        "calls",
        "end",
        "length",
    }
    assert states["teacher"] == "inapplicable" == states["guided"]  # no key; and a teacher that knows no null class
    odd = row([0.5, 0.4, 0.6], 50, key="mid.lr") | {"question": "of another version"}
    assert said(run, [odd], "of another version").state == "unmeasured"


@pytest.mark.parametrize(
    ("mine", "state", "words"),
    [
        (4, "kept", ["undecided", "not told apart from 16"]),
        (16, "kept", ["are not told apart", "1.1 times the distance [0.8, 1.5]", "3 seeds"]),
        (2, "unmeasured", ["per_trajectory=2 was not measured, 4, 16 were"]),
    ],
)
def test_an_interval_that_holds_one_decides_nothing(mine, state, words):
    answer = said(loading.load("digits", [f"{POINTS}={mine}"]), [row([1.1, 0.8, 1.5], 101)], "points")
    assert answer.state == state and answer.line is None and all(word in answer.text for word in words)


def test_what_is_nearer_and_what_is_only_cheaper_are_told_apart():
    run = loading.load("digits", [f"{POINTS}=16"])
    nearer, cheaper = (said(run, [row(ratio, 200)], "points") for ratio in ([0.5, 0.4, 0.6], [1.1, 0.8, 1.5]))
    assert nearer.state == "advised" and "not told apart" not in nearer.text
    assert cheaper.state == "cheaper" and "not told apart and costs less" in cheaper.text
    (own,) = [a for a in advice.answers(loading.load("digits"), [row([0.5, 0.4, 0.6], 200)]) if a.question == "points"]
    assert own.state == "kept" and "nearer than 16" in own.text and "undecided" not in own.text


@pytest.mark.parametrize(
    ("keys", "question", "why"),
    [
        (["mid.trajectories.mode=paper"], "points", "mode is paper"),
        (["mid.trajectories.cache=there"], "pool", "read from there"),
        (["mid.trajectories.nfe=auto"], "calls", "by the student's own error"),
        (
            ["mid.trajectories.nfe=auto", "mid.trajectories.budget_forwards=90000"],
            "solver",
            "by the bound on the gradient's bias",
        ),
        (["mid.trajectories.nfe=auto", "mid.trajectories.budget_forwards=90000"], "length", "budget_forwards"),
    ],
)
def test_a_question_that_is_none_of_this_recipes_says_why(keys, question, why):
    answer = said(loading.load("digits", keys), [row([0.5, 0.4, 0.6], 50) | {"question": question}], question)
    assert answer.state == "inapplicable" and why in answer.text and answer.line is None


def test_what_the_recipe_cannot_take_is_refused_in_the_schemas_words(monkeypatch, capsys):
    """Three points a trajectory make no whole trajectories of 64 rows x 20 steps; the plan is printed all the same."""
    monkeypatch.setattr(advice, "measured", lambda: (row([0.5, 0.4, 0.6], 50, advised=3, other=4),))
    assert main(["plan", "digits", "--hours", "1"]) in (0, None)
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "points of a trajectory" in text]
    assert f"{POINTS}=3, 0.5 times the distance [0.4, 0.6]" in line and "cannot be had here" in line and "whole" in line


def test_two_keys_of_one_answer_go_together():
    ends = "mid.trajectories.t_max,mid.trajectories.t_min"
    found = [row([0.5, 0.4, 0.6], 100, advised=[80.0, 0.2], other=[80.0, 0.002], key=ends) | {"question": "end"}]
    answer = said(loading.load("digits"), found, "end")
    assert "mid.trajectories.t_max=80.0 mid.trajectories.t_min=0.2 (this plan's: 80.0 and 0.002)" in answer.text
    assert questions.QUESTIONS["end"].values("digits", "ve") == (
        ends, {"80 to 0.002": [80.0, 0.002], "80 to 0.2": [80.0, 0.2], "20 to 0.002": [20.0, 0.002]},
    )  # fmt: skip
    key, shifts = questions.QUESTIONS["end"].values("digits", "linear")
    for arm, more in questions.QUESTIONS["end"].arms("digits", "linear").items():
        assert advice.own(loading.load("digits-mf", list(more)), key) == shifts[arm]
    assert questions.QUESTIONS["guided"].values("digits", "ve")[1] == {"1": 1.0, "1.5": 1.5}


def test_a_plan_names_the_measurement_on_the_run_itself_at_its_own_forwards(capsys):
    """12,800 images of 3 + 16 / 4 forwards; the words of a budget are those of the plan, shorter where the hours are few."""
    assert advice.by_measurement(loading.load("digits")).endswith("budget_forwards=89600")
    auto = ["mid.trajectories.nfe=auto", "mid.trajectories.budget_forwards=89600"]
    assert advice.by_measurement(loading.load("digits", auto)) == ""
    hours = lambda *keys: main(["plan", "digits", *keys, "--hours", "0.005", "--stages", "mid", "--gpu", "cpu"])
    assert hours(*auto) in (0, None)
    text = capsys.readouterr().out
    (cut,) = [line for line in text.splitlines() if line.startswith("  mid.trajectories.budget_forwards=")]
    assert int(cut.partition("=")[2].split()[0]) < 89600 and "of the recipe's" in cut


def test_what_comes_with_the_package_fits_every_recipe():
    for found in advice.measured():
        assert {"suite", "objective", "path", "key", "advised", "arms"} <= found.keys()
    for recipe in ("digits", "digits-mf", "imagenet512-dit"):
        for line in advice.lines(loading.load(recipe)):
            assert line.value != line.was
