"""The Python API: docs/api.md runs as it stands, and each function gives what the command gives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cmt_fast import api, cli
from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import machine
from cmt_fast.teacher.precision import Teacher
from tests.fixtures.tiny import metrics

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's code leaves behind, and the folder that it ran in."""
    folder, names = tmp_path_factory.mktemp("api"), {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
            exec(compile(block, "docs/api.md", "exec"), names)
    finally:
        os.chdir(before)
    return folder, names


def test_the_page_leaves_what_it_says(page):
    folder, names = page
    assert names["x"].shape == (20, 1, 8, 8) and names["x"].dtype == torch.float32
    assert (folder / "samples.png").stat().st_size > 100
    assert names["nodes"].shape[1:] == (8, 1, 8, 8) and len(names["times"]) == len(names["nodes"])


def test_samples_are_those_of_the_command(page, tmp_path):
    folder, names = page
    arguments = ["--steps", "1", "--n", "20", "--seed", "0", "--out", str(tmp_path / "x.npz")]
    assert cli.main(["sample", str(folder / "runs/mine/mid"), *arguments]) == 0
    found = np.load(tmp_path / "x.npz")
    x, labels = api.sample(folder / "runs/mine/mid", n=20, steps=1, seed=0)
    assert np.array_equal(found["images"], x.numpy()) and np.array_equal(found["labels"], labels.numpy())
    assert torch.equal(x, names["x"])


def test_figures_are_those_of_the_command(page):
    folder, names = page
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(["eval", str(folder / "runs/mine/mid"), "--steps", "1,2", "--n", "40", "--json"]) == 0
    figures = json.loads(said.getvalue())
    assert figures.get("steps", figures) == names["figures"]


def test_trajectories_are_those_that_the_stage_trains_on(page):
    folder, _ = page
    work = api.open_run(folder / "runs/mine")
    nodes, times, labels = api.trajectories(work, "mid", n=8)
    stage = work.stage("mid")
    pool = stage.pool(work.network("pre"), work.data.shape, work.data.classes, work.device)
    pool._fill(0)
    torch.testing.assert_close(
        pool._states[:, :8], nodes, rtol=1e-4, atol=1e-4
    )  # batches of other sizes round otherwise
    assert torch.equal(pool._states[0, :8], nodes[0]) and torch.equal(pool._labels[:8], labels)
    assert times[0] == stage.trajectories.t_max and times[-1] == stage.trajectories.t_min


def test_a_training_step_is_the_command_s(page):
    folder, names = page
    rows = [row for row in metrics(folder / "runs/mine/mid") if row["kind"] == "train"]
    assert [row["step"] for row in rows[:2]] == [1, 2]  # a row a step
    for row, step in zip(rows, (names["first"], names["second"])):
        assert {key: row[key] for key in step} == pytest.approx(step, rel=1e-6)


def short(page, *overrides: str):
    """The page's run with other keys of mid."""
    folder, names = page
    pool = "mid.trajectories.pool_steps=4"
    return api.open_recipe("digits", *names["small"], *names["short"], pool, *overrides, out=folder / "runs/mine")


def test_a_stage_has_no_step_after_its_last(page):
    """There a linear schedule's rate would be negative."""
    work = short(page, "mid.images_nimg=128")
    _, step = api.training_steps(work, "mid")
    rates = [step()["lr"] for _ in range(work.stage("mid").schedule.total)]
    assert min(rates) >= 0
    with pytest.raises(ValueError, match="mid: all of its 4 steps are taken"):
        step()


def test_a_step_computes_in_the_stages_format(page, monkeypatch):
    allowed = []
    monkeypatch.setattr(machine, "allow_tf32", allowed.append)
    _, step = api.training_steps(short(page, "mid.precision=tf32"), "mid")
    step()
    assert allowed == [True, False]


def test_trajectories_are_in_the_stages_format(page, monkeypatch):
    formats, net = [], Teacher.net
    monkeypatch.setattr(Teacher, "net", lambda self, format: formats.append(format) or net(self, format))
    api.trajectories(short(page, "mid.precision=bf16"), "mid", n=2)
    assert formats[-1] == "bf16"


def test_what_a_user_gets_wrong_is_one_line(page):
    folder, _ = page
    stage, work = folder / "runs/mine/mid", api.open_run(folder / "runs/mine")
    for call, said in (
        (lambda: api.sample(stage, n=0), "n: 0 is not at least 1"),
        (lambda: api.sample(stage, steps=0), "steps: 0 is not at least 1"),
        (lambda: api.sample(stage, n=2, steps=3), "has no 2 times for 3 steps"),
        (lambda: api.evaluate(stage, n=0), "n: 0 is not at least 2"),
        (lambda: api.evaluate(stage, steps=(0,)), "steps: 0 is not at least 1"),
        (lambda: api.trajectories(work, "mid", n=0), "n: 0 is not at least 1"),
        (lambda: api.trajectories(work, "pre"), "pre.trajectories: is missing"),
        (lambda: api.trajectories(work, "mdi"), "mdi: is no stage of digits.*did you mean mid"),
        (lambda: api.training_steps(work, "mdi"), "mdi: is no stage of digits"),
        (lambda: api.train(work, ["mdi"]), "mdi: is no stage of digits"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is no run"):
        api.open_run(tmp_path)
    with pytest.raises(ConfigError, match="did you mean digits"):
        api.open_recipe("digit")
