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
    "keys": 1.0,
    "keys post.lr": 1.0,
    "train digits --dry-run": 3.0,
    "doctor": 2.0,
    "estimate imagenet512-ecd --gpu h100 --gpus 8": 4.0,
}
IMPORT = 1.1
COMPILING = ("doctor",)  # it asks torch for all it has


# what a compiler brings, and takes longer to import than any of these commands may
COMPILER = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")
CHILD = """
import runpy, sys
try:
    runpy.run_module("cmt_fast", run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in %r if name in sys.modules])
"""


def run(code: str, *arguments: str) -> tuple[float, str]:
    """CPU seconds of a child process, and its last line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken, (done.stdout.splitlines() or [""])[-1]


@pytest.mark.parametrize("command", ["--help", "recipes ls", "keys post.lr"])
def test_what_only_reads_words_imports_no_torch(command):
    code = CHILD % (("torch", "cmt_kernels"),)
    assert run(code, *command.split())[1] == "0 []"


@pytest.fixture(scope="module")
def pace() -> float:
    """How much slower than the machine of the limits this one is; at least 1."""
    return max(1.0, min(run("import torch")[0] for _ in range(2)) / IMPORT)


@pytest.mark.parametrize("command", LIMITS)
def test_a_short_command_starts_soon_and_imports_no_compiler(command, pace):
    child, limit = CHILD % (COMPILER,), LIMITS[command] * pace
    taken, said = run(child, *command.split())
    assert said == "0 []" or (command in COMPILING and said.startswith("0 ")), said
    if taken >= limit:  # the better of two
        taken = run(child, *command.split())[0]
    assert taken < limit, f"cmt {command}: {taken:.2f} CPU seconds, at a pace of {pace:.2f}"
