"""How much processor time short commands take, in a process of their own."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

# CPU seconds, user and system, where `import torch` takes IMPORT of them; a slower machine is given more in proportion
LIMITS = {
    "--help": 0.3,
    "recipes ls": 0.3,
    "train digits --dry-run": 3.0,
    "doctor": 2.0,
    "estimate imagenet512-ecd --gpu h100 --gpus 8": 4.0,
}
IMPORT = 1.1


def seconds(*arguments: str) -> float:
    """CPU seconds of a child process, the better of two runs."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once(), once())


@pytest.fixture(scope="module")
def pace() -> float:
    """How much slower than the machine of the limits this one is; at least 1."""
    return max(1.0, seconds("-c", "import torch") / IMPORT)


@pytest.mark.parametrize("command", LIMITS)
def test_a_short_command_starts_soon(command, pace):
    taken = seconds("-m", "cmt_fast", *command.split())
    assert taken < LIMITS[command] * pace, f"cmt {command}: {taken:.2f} CPU seconds, at a pace of {pace:.2f}"


# what a compiler brings, and takes longer to import than any of these commands may
COMPILER = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")
CHILD = """
import runpy, sys
try:
    runpy.run_module("cmt_fast", run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in %r if name in sys.modules])
"""


@pytest.mark.parametrize("command", [command for command in LIMITS if command != "doctor"])
def test_a_short_command_imports_no_compiler(command):
    child = [sys.executable, "-c", CHILD % (COMPILER,), *command.split()]
    said = subprocess.run(child, capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "0 []", said.stdout[-300:] + said.stderr[-300:]
