"""`make gpu` without a GPU: every part is a command that exists, and a missing package stops one part alone."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from bench import gpu
from bench.__main__ import BENCHES

ROOT = Path(__file__).parent.parent


def options(*parts: str, tiny: bool = True) -> argparse.Namespace:
    return argparse.Namespace(part=list(parts), device="cpu", tiny=tiny)


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that would run, each "succeeding"."""
    made: list[list[str]] = []
    monkeypatch.setattr(gpu, "call", lambda limit_s, *arguments: made.append(list(arguments)) or 0)
    monkeypatch.setenv("OUT", str(tmp_path))
    return made


@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_is_a_command_that_parses(calls, tiny):
    assert gpu.run(options(*gpu.PARTS, tiny=tiny)) == 0
    assert len(calls) == len(gpu.PARTS) == len(gpu.FUNCTIONS)
    for _, module, *rest in calls:
        assert module in ("bench", "pytest", "cmt_fast")
        if module == "bench":
            assert rest[0] in BENCHES
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"bench.{rest[0]}").add_arguments(parser)
            parser.parse_args(rest[1:])
    assert gpu.LIMIT_S < 600


def test_a_missing_package_stops_its_part_alone_and_is_named(calls, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PARTS, "step", ("no_such_package",))
    assert gpu.run(options("step", "calibrate")) == 1
    assert "step       NOT RUN: needs no_such_package" in capsys.readouterr().out
    assert [c[2] for c in calls] == ["calibrate"]


def test_a_part_that_fails_is_reported_and_the_next_runs(calls, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "call", lambda limit_s, *arguments: calls.append(list(arguments)) or len(calls) % 2)
    assert gpu.run(options("calibrate", "ops")) == 1
    assert "FAILED, exit code 1" in capsys.readouterr().out and len(calls) == 2


def test_the_makefile_names_parts_that_exist():
    named = set(re.findall(r"gpu-([\w-]+)", (ROOT / "Makefile").read_text())) - {"dry", "kit"}
    assert named and named <= set(gpu.PARTS)


def test_no_gpu_is_said_at_once():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device; `make gpu-dry`"):
        gpu.run(argparse.Namespace(part=[], device="cuda", tiny=False))
