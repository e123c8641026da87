"""A ruined CUDA context costs one test. The GPU is made up: `synchronize` fails for good after a planted fault."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.fixtures import forked, isolation

ROOT = Path(__file__).parents[1]
GPU = """
import os, sys
import torch
sys.executable = os.environ["PLANTED_PYTHON"]  # processes of xdist and of isolation.py are forked too
from tests.fixtures import isolation

fault = None

def synchronize():
    if fault:
        raise RuntimeError("CUDA error: misaligned address\\nCompile with ...")

torch.cuda.synchronize, torch.cuda.is_available, isolation.initialized = synchronize, lambda: True, lambda: True
"""
TESTS = """
import os
import pytest
import planted_gpu

pytestmark = pytest.mark.gpu

def works():
    planted_gpu.synchronize()

def test_a(): works()
def test_b(): planted_gpu.fault = True
def test_c(): works()
@pytest.mark.skip(reason="not today")
def test_d(): works()
def test_e():
    works()
    assert 1 == 2
def test_f():
    planted_gpu.fault = True
    works()
def test_g(): os._exit(139)
def test_h(): works()
@pytest.mark.parametrize("n", range(20))
def test_i(n): works()
"""


def pytest_on(folder: Path, tests: str, *arguments: str) -> tuple[str, dict[str, str]]:
    """What pytest prints of these tests with this project's conftest on the planted GPU; outcome by test."""
    (folder / "planted_gpu.py").write_text(GPU)
    (folder / "test_planted.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    command = [
        *forked.python("torch"),
        "-m",
        "pytest",
        "-p",
        "planted_gpu",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-rA", *arguments, "test_planted.py"], cwd=folder, capture_output=True, text=True,
        env=env | {"PYTHONPATH": path, "PLANTED_PYTHON": forked.executable("torch")}, timeout=300,
    )  # fmt: skip
    said = re.findall(
        r"^(PASSED|FAILED|ERROR) (?:\S*test_planted.py::)(test_\w(?:\[\d+\])?)", done.stdout, re.MULTILINE
    )
    outcomes: dict[str, str] = {}
    for outcome, name in said:  # a test that ended a process of xdist may have passed before it was found out
        outcomes[name] = "FAILED" if "FAILED" in (outcome, outcomes.get(name)) else outcome
    return done.stdout + done.stderr, outcomes


@pytest.mark.parametrize("spread", [(), ("-n", "2"), ("-n", "2", "--dist", "loadfile")], ids=" ".join)
def test_only_the_guilty_fail(tmp_path: Path, spread: tuple[str, ...]) -> None:
    """b and f leave the device unusable, e fails of itself, g kills its process: c, h and every i pass."""
    if spread:
        pytest.importorskip("xdist")
    tests = TESTS
    text, outcomes = pytest_on(tmp_path, tests, *spread)
    passed = {"test_a", "test_c", "test_h", *(f"test_i[{n}]" for n in range(20))}
    assert {name for name, outcome in outcomes.items() if outcome == "PASSED"} == passed, text
    assert {name for name, outcome in outcomes.items() if outcome == "FAILED"} == {f"test_{x}" for x in "befg"}, text
    assert "misaligned address" in text and "not today" in text
    if not spread:
        assert "test_b left the GPU unusable to its process" in text and "exit code 139" in text, text
        assert "4 failed, 23 passed, 1 skipped" in text, text


def test_an_error_that_is_told_once_ruins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def synchronize(last: int) -> None:
        calls.append(1)
        if len(calls) <= last:
            raise RuntimeError("CUDA error: invalid argument\nmore")

    for last, expected in ((0, None), (1, None), (2, "CUDA error: invalid argument")):
        calls.clear()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda last=last: synchronize(last))
        assert isolation.ruined() == expected


def test_without_a_fault_nothing_runs_elsewhere(tmp_path: Path) -> None:
    tests = TESTS.replace("planted_gpu.fault = True", "pass").replace("os._exit(139)", "pass").replace("1 == 2", "1")
    text, outcomes = pytest_on(tmp_path, tests)
    assert "27 passed, 1 skipped" in text and "unusable" not in text and set(outcomes.values()) == {"PASSED"}


@pytest.mark.parametrize("lacks, outcome", [("pydantic", "27 passed, 2 skipped"), ("of_our_own", "1 error")])
def test_a_package_of_the_trainer_that_is_not_there_is_a_skip_that_says_so(tmp_path, lacks: str, outcome: str) -> None:
    """And a module of any other name that cannot be found is an error, as ever."""
    blocked = f"""
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name == {lacks!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
    (tmp_path / "blocked.py").write_text(blocked)
    (tmp_path / "test_other.py").write_text(f"import {lacks}\n\ndef test_never():\n    assert 0\n")
    tests = TESTS.replace("planted_gpu.fault = True", "pass").replace("os._exit(139)", "pass").replace("1 == 2", "1")
    text, _ = pytest_on(tmp_path, tests, "-p", "blocked", "--continue-on-collection-errors", "test_other.py")
    assert outcome in text and ("needs pydantic, which is not installed" in text) == (lacks == "pydantic"), text
