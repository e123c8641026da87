"""The sweep of attention: what is wrong is named, what kills its process too, and the other shapes are measured all the same."""

from __future__ import annotations

import argparse
import json
import os

import pytest

from bench.harness.worker import Worker
from bench.kernels import sweep
from tests.fixtures import forked

PLANTED = """
import os, sys, torch
from cmt_kernels import Dual
from bench.kernels import sweep
from bench.harness import worker
real = sweep.implementation
def implementation(op, backend):
    f = real(op, "reference")
    if backend != "planted":
        return f
    def wrong(x):
        value = x.value if isinstance(x, Dual) else x
        y, t = f(x), value.shape[1]
        if t == 7:
            os.kill(os.getpid(), 11)
        if t == 9:
            raise RuntimeError("no kernel for it")
        if isinstance(y, Dual) and t == 5:
            return Dual(y.value, y.tangent * 1.02)
        if isinstance(y, Dual) and t == 4:
            return Dual(y.value * (1 + 1e-7), y.tangent)
        if t == 3 and torch.is_grad_enabled():
            return y + 0.01 * (value.sum() - value.sum().detach())
        return y
    return wrong
sweep.implementation = implementation
worker.serve(sys.argv[1])
"""


def run(tmp_path, *options: str) -> tuple[int, dict]:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    where = tmp_path / "sweep.json"
    code = sweep.run(parser.parse_args(["--device", "cpu", "--json", str(where), *options]))
    return code, json.loads(where.read_text())


def test_plain_torch_is_right_at_every_shape(tmp_path):
    code, data = run(tmp_path, "--tiny")
    assert code == 0 and len(data["rows"]) == data["asked"] == 4
    assert all(row["wrong"] == [] and 0 < row["error"]["gradient"] < 1e-6 for row in data["rows"])


def test_what_is_wrong_is_named_and_a_crash_is_its_shapes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "python", staticmethod(lambda: [*forked.python(), "-c", PLANTED]))
    tokens = ["2", "3", "4", "5", "7", "8", "9"]
    code, data = run(
        tmp_path, "--backend", "planted", "--tokens", *tokens, "--dims", "16", "--dtypes", "fp32", "--workers", "1"
    )
    rows = {row["T"]: row for row in data["rows"]}
    assert code == 1 and set(rows) == set(map(int, tokens))
    assert [rows[t].get("wrong") for t in (2, 8)] == [[], []]
    assert rows[3]["wrong"] == ["gradient"] and rows[5]["wrong"] == ["tangent"] and rows[4]["wrong"] == ["bits"]
    assert rows[7]["crash"] == "killed by SIGSEGV" and "no kernel for it" in rows[9]["crash"]


def test_shapes_that_time_does_not_allow_are_named(tmp_path):
    code, data = run(tmp_path, "--tiny", "--minutes", "0")
    assert code == 0 and data["rows"] == [] and "4 of 4 shapes: T16-d16-fp32" in data["not_measured"][0]


@pytest.mark.parametrize("errors", [0, 2])
def test_a_sanitizer_of_path_is_run_and_its_errors_are_kept(tmp_path, monkeypatch, errors):
    """A stand-in that runs what it is given and writes what compute-sanitizer writes."""
    tool = tmp_path / "compute-sanitizer"
    said = (
        "========= Invalid __shared__ read of size 16 bytes\\n" * errors
        + f"========= ERROR SUMMARY: {errors} errors\\n"
    )
    tool.write_text(f'#!/bin/sh\nprintf "{said}" > "$4"\nshift 4\nexec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, data = run(tmp_path, "--tiny")
    found = data["sanitizer"]
    assert found["shapes"] == 1 and found["errors"] == errors and code == int(errors > 0)
    assert found["first"] == ["Invalid __shared__ read of size 16 bytes"] * errors
    assert [row["under"] for row in data["rows"] if "under" in row] == ["compute-sanitizer"]


def test_shapes_begin_with_those_of_the_recipes():
    first = sweep.shapes(sweep.TOKENS, sweep.DIMS, ("bf16", "fp32"))
    assert first[:3] == [(64, 72, "bf16"), (64, 64, "bf16"), (256, 72, "bf16")]
    assert len(first) == len(set(first)) == len(sweep.TOKENS) * len(sweep.DIMS) * 2
