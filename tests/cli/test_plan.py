"""`cmt plan`: what it prints is a command that trains, and costs in `cmt estimate` what the plan said."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from cmt_fast.cli import main
from cmt_fast.cost.hardware import RESULTS
from tests.fixtures.commands import ROOT

TINY = ("model.width=16", "model.depth=1", "model.heads=2", "mid.eval_every_nimg=null", "post.eval_every_nimg=null")


def told(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_prints_is_taken_by_train_and_costs_in_estimate_what_it_said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = told(capsys, "plan", "digits", *TINY, "--gpu", "h100", "--hours", "1e6")
    assert whole["fraction"] == 1 and not [c for c in whole["changes"] if c["method"]]
    found = told(capsys, "plan", "digits", *TINY, "--gpu", "h100", "--gpu-hours", str(0.3 * whole["gpu_hours"]))
    assert 0.01 < found["fraction"] < 1 and found["gpu_hours"] <= 0.3 * whole["gpu_hours"]
    start, command, *arguments = shlex.split(found["commands"]["estimate"])
    assert (start, command) == ("cmt", "estimate")
    cost = told(capsys, command, *arguments)
    for name, stage in found["stages"].items():
        assert cost["stages"][name]["hours"] == pytest.approx(stage["train_hours"])
        assert cost["stages"][name]["images"] == stage["images"]
        held = stage["memory"]
        assert cost["stages"][name]["memory"]["bytes"] == pytest.approx(held["bytes"]) and held["bytes"] < held["limit"]
    assert cost["total"]["gpu_hours"] == pytest.approx(found["gpu_hours"])
    train = shlex.split(found["commands"]["train"])
    assert train[:3] == ["cmt", "train", "digits"] and "--from RUN" in found["commands"]["train"]
    arguments = [a for a in train[1:] if a not in ("--from", "RUN")]
    assert main([*arguments[:-1], "pre,mid,post", "--dry-run", "device=cpu", "--out", str(tmp_path / "run")]) == 0
    assert f"{found['stages']['mid']['images']:,} images" in capsys.readouterr().out


def test_a_plan_names_every_stage_that_another_run_must_have(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "digits", *TINY, "--stages", "post", "--hours", "9"]) == 0
    said = capsys.readouterr().out
    assert "RUN: the run that has `pre` and `mid`" in said and "--stages post --from RUN" in said
    of = lambda *names: told(capsys, "plan", "digits", *TINY, "--stages", ",".join(names), "--hours", "9")["commands"]
    assert of("mid", "post")["of_run"] == ["pre"]
    whole = of("pre", "mid", "post")
    assert whole["of_run"] == [] and "--from" not in whole["train"]


def test_money_hours_and_gpu_hours_are_one_dial(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = lambda *dial: told(capsys, "plan", "gmm", "--gpus", "2", *dial)
    hours, cards, money = of("--hours", "3"), of("--gpu-hours", "6"), of("--dollars", "18", "--price", "3")
    assert hours["budget_hours"] == cards["budget_hours"] == money["budget_hours"] == 3
    assert hours["gpu_hours"] == money["gpu_hours"] and money["price"] == pytest.approx(3 * money["gpu_hours"])
    assert hours["price"] is None


def test_the_tables_name_every_figures_source(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["plan", "digits", *TINY, "--stages", "pre,mid,post", "--hours", "9"]
    assert main([*given, "--gpu", "rtx4090"]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTED unless marked measured" in printed and "nothing differs from the recipe" in printed
    for what in (
        "matmul bf16",
        "copy",
        "memory",
        "links",
        "mid: measured / predicted time",
        "networks other than a DiT",
    ):
        assert re.search(rf"^  {what} .*; .*(datasheet|whitepaper|assumed|measured|counted)", printed, re.M), what
    held = re.search(r"^ +(\S+ \S+) (activations of .* rows) ", printed, re.M)
    assert re.search(rf"  pre: {held[2]} +{held[1]}; ", printed)  # one part of a step, not all of it
    assert "cmt train digits" in printed and "--from RUN" not in printed  # `pre` is planned, and needs no other run
    assert main([*given, "--gpu", "laptop", "--results", str(ROOT / RESULTS)]) == 0
    printed = capsys.readouterr().out
    assert "16.0 GB; 16 GB of memory, assumed" in printed and "measured: cpu/" in printed
    factor = re.search(r"pre: measured / predicted time +(\S+); (.*)", printed)
    assert float(factor[1]) > 0 and "cpu/step.json" in factor[2]  # of the committed file


def test_several_machines_are_started_by_torchrun(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = lambda n: told(capsys, "plan", "digits", *TINY, "--gpus", str(n), "--hours", "9")["commands"]["train"]
    assert started(4).startswith("torchrun --standalone --nproc-per-node 4 -m cmt_fast train digits")
    assert started(16).startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d")
    assert "--rdzv-id RUN_ID" in started(16)


def test_rows_that_16_bits_leave_to_fp32_are_among_the_sources(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = told(capsys, "plan", "digits", *TINY, "post.precision=bf16", "post.objective.q=1024", "--hours", "9")
    (row,) = [row for row in found["sources"] if "rows in fp32" in row["what"]]
    assert row["what"].startswith("post: ") and row["value"] == "100%" and "rounding.json" in row["source"]


@pytest.mark.parametrize(
    "arguments, error",
    [(["--hours", "1", "--gpu", "rtx409"], "--gpu: 'rtx409' is not valid.*did you mean rtx4090"),
     (["--hours", "0"], "--hours: 0.0 is not valid"), (["--hours", "nan"], "--hours: nan is not valid"),
     (["--dollars", "5"], "--price: is missing; --dollars needs what a GPU-hour costs"),
     (["--hours", "1", "--dollars", "5"], "not allowed with"),
     (["--dollars", "1", "--price", "1e-320"], "--dollars: 1.0 at a price of .* are inf hours"),
     ([], "one of the arguments --hours --gpu-hours --dollars is required"),
     (["--hours", "1", "--stages", "mdi"], "--stages: 'mdi' is not valid.*did you mean mid"),
     (["--hours", "1", "--gpus", "0"], "--gpus: 0 is not valid"),
     (["--hours", "1e-9"], "budget: 1e-09 hours on 1 x h100 hold less than 1% of this recipe's images; that takes"),
     (["--hours", "1", "--gpu", "cpu"], "--gpu: 'cpu' has no measurements"),
     (["--hours", "1", "mid.batch=63"], "batch: 63 rows x .* are not a whole number of trajectories")],
)  # fmt: skip
def test_wrong_input(arguments, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "gmm", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(error, said) and said.count("\n") == 1
