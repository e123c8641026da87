"""The command line end to end on a tiny run: train, resume, sample, eval, report, torchrun, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cmt_fast.cli import _subparsers, complete_parser
from cmt_fast.config.schema import Digits
from cmt_fast.data import datasets
from cmt_fast.storage import checkpoint
from tests.fixtures import forked
from tests.fixtures.tiny import NO_EVAL, SMALL, cmt, metrics
from tests.train.test_resume import assert_equal_stage

TINY = [*SMALL, *NO_EVAL, "mid.eval_every_nimg=320"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All four stages of digits by one command."""
    folder = tmp_path_factory.mktemp("cli")
    done = cmt("train", "digits", *TINY, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and "100 %" in done.stdout
    return folder


def test_the_run_folder(run):
    for stage in ("pre", "mid", "post", "control"):
        folder = run / "run" / stage
        assert checkpoint.complete(folder).manifest["stage"] == stage
        assert list((folder / "grids").glob("*.png")) and metrics(folder)[-1]["kind"] in ("train", "eval")
    about = json.loads((run / "run" / "run.json").read_text())
    assert about["ops"]["attention"] == "reference" and about["run"]["name"] == "digits"


def test_the_same_command_again_does_nothing(run):
    done = cmt("train", "digits", *TINY, "--out", "run", cwd=run)
    assert done.returncode == 0 and done.stdout.count("done (") == 4


@pytest.mark.parametrize("more", [[], ["--solver"]], ids=["few-step", "solver"])
def test_sample_writes_what_it_says(run, more):
    done = cmt(
        "sample",
        "run/post",
        "--steps",
        "2",
        "--n",
        "40",
        "--seed",
        "3",
        "--out",
        f"x{len(more)}.npz",  # one that is there is not written over
        "--grid",
        "x.png",
        *more,
        cwd=run,
    )
    assert done.returncode == 0, done.stderr
    file = np.load(run / f"x{len(more)}.npz")
    assert file["images"].shape == (40, 1, 8, 8) and file["images"].dtype == np.float32
    rows = np.bincount(datasets.load(Digits()).labels, minlength=10)
    assert (abs(np.bincount(file["labels"], minlength=10) - 40 * rows / rows.sum()) < 1).all()  # as the data's
    assert (run / "x.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_a_function_of_seed_and_index(run):
    for n, name in ((30, "a"), (12, "b")):
        cmt("sample", "run/mid", "--n", str(n), "--seed", "5", "--out", f"{name}.npz", cwd=run)
    a, b = (np.load(run / f"{x}.npz")["images"] for x in "ab")
    np.testing.assert_allclose(a[:12], b, atol=1e-5)


def test_eval_prints_json(run):
    done = cmt("eval", "run/post", "--steps", "1,2", "--n", "100", "--json", cwd=run)
    out = json.loads(done.stdout)
    assert set(out["steps"]) == {"1", "2"} and 0 <= out["steps"]["1"]["accuracy"] <= 1
    assert out["extractor"].startswith("classifier-64-32@")


def test_dry_run_says_what_would_be_done(tmp_path):
    done = cmt("train", "digits-mf", "--dry-run", "--out", "never", cwd=tmp_path)
    assert done.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["never-look.png"]
    for word in ("digest:", "ops: reference ", "parameters", "network forwards", "post:"):
        assert word in done.stdout


def test_recipes_ckpt_and_doctor(run):
    assert "digits-mf" in cmt("recipes", "ls").stdout
    assert cmt("recipes", "copy", "digits", "mine.yaml", cwd=run).returncode == 0
    assert cmt("recipes", "validate", "mine.yaml", cwd=run).stdout.startswith("mine.yaml: valid")
    assert cmt("recipes", "validate", "--all").returncode == 0
    assert "sound" in cmt("ckpt", "verify", "run", cwd=run).stdout
    assert "step-" in cmt("ckpt", "ls", "run", cwd=run).stdout
    assert "torch" in cmt("doctor").stdout


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """As `head` does: not a word, and the exit code of SIGPIPE."""
    command = f"{sys.executable} -m cmt_fast train digits --dry-run | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_stages_from_another_run(run):
    done = cmt("train", "digits", *TINY, "post.lr=1e-5", "--stages", "post", "--from", "run", "--out", "other", cwd=run)
    assert done.returncode == 0, done.stderr
    lineage = checkpoint.complete(run / "other" / "post").manifest["parent"]
    assert lineage["ema"] == checkpoint.complete(run / "run" / "mid").manifest["files"]["ema-0.safetensors"]["xxh3_128"]


def test_post_hoc_ema(tmp_path):
    power = "pre.ema=[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.1}]"
    done = cmt(
        "train", "digits", *TINY, power, "pre.snapshot_every_nimg=100", "--stages", "pre", "--out", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    done = cmt("ckpt", "reconstruct", "run/pre", "--sigma-rel", "0.07", "--out", "e.safetensors", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "e.safetensors").is_file(), done.stderr


def test_torchrun_on_two_processes_trains_the_same_network(tmp_path):
    long = [*TINY, "--stages", "pre,mid"]
    assert cmt("train", "digits", *long, "--out", "one", cwd=tmp_path).returncode == 0
    torchrun = [
        *forked.python("torch"),
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29613",
    ]
    command = [*torchrun, "-m", "cmt_fast"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": forked.executable()}  # by which it starts its ranks
    run = lambda *rest: subprocess.run(
        [*command, *rest], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300
    )
    done = run("train", "digits", *long, "--out", "two", "--log-every-s", "0.05")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    steps = [line for line in said if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +(pre|mid) step ", line)]
    assert sum("100 %" in line for line in steps) == 2 and len(set(said)) == len(said)  # rank 0's alone
    assert said[-1].startswith("done in ") and "core-h in all" in said[-1]
    for stage in ("pre", "mid"):
        one, two = (checkpoint.complete(tmp_path / r / stage).tensors("model") for r in ("one", "two"))
        for name in one:
            assert torch.allclose(one[name], two[name], atol=2e-4), (stage, name)
    # a rank that dies: all are started again, and end with the same bits
    again = [*torchrun, "--max-restarts", "1", "-m", "cmt_fast", "train", "digits", *long, "--out", "killed"]
    with subprocess.Popen(again, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env) as started:
        beat, deadline = tmp_path / "killed" / "heartbeats" / "rank-1.json", time.time() + 60
        while time.time() < deadline and not (beat.is_file() and checkpoint.steps(tmp_path / "killed" / "pre")):
            time.sleep(0.005)
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
        said_then = started.communicate(timeout=300)[1]
    assert started.returncode == 0, said_then
    for stage in ("pre", "mid"):
        assert_equal_stage(tmp_path / "killed" / stage, tmp_path / "two" / stage)
    # an error of all ranks: once, by the first, and the last thing that torchrun says but for its frame
    wrong = run("--", "train", "digits", "pre.btch=3")
    line = "cmt: pre.btch: unknown key"
    assert wrong.returncode and wrong.stdout == "" and wrong.stderr.startswith(line)
    assert sum(text.startswith(line) for text in wrong.stderr.splitlines()) == 1
    assert wrong.stderr.splitlines()[-2].strip().startswith(f"traceback : {line}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(tmp_path, number):
    command = [
        *forked.python(),
        "-m",
        "cmt_fast",
        "train",
        "digits",
        *TINY,
        "pre.images_nimg=320000",
        "--stages",
        "pre",
        "--out",
        "run",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics_file = tmp_path / "run" / "pre" / "metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (metrics_file.is_file() and metrics_file.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "to resume" in err
    assert checkpoint.latest(tmp_path / "run" / "pre").manifest["step"] > 0


def test_every_argument_says_what_it_takes():
    """In `--help`, in the completion of zsh and fish, and where a required one is missing."""
    parsers = [p for p in _subparsers(complete_parser())]
    bare = [(p.prog, a.dest) for p in parsers for a in p._actions if not a.help and a.dest not in ("action", "command")]
    assert len(parsers) > 20 and bare == []
