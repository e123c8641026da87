"""Every Triton launch of ours runs on the device of its tensors: read off the sources, and seen in the interpreter."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cmt_kernels import OPS, launch
from cmt_kernels.cases import cases_of, implementation, outputs
from cmt_kernels.launch import device_of, placed

from tests.fixtures import forked
from tests.kernels.test_ops import with_leaves

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = Path(launch.__file__).parent
TRITON = sorted(KERNELS.glob("*/triton*.py"))
TRITON_OPS = [op for op in OPS if (KERNELS / op / "triton.py").exists()]


class On(torch.Tensor):
    """A tensor that says it is on a device which this machine need not have."""

    @staticmethod
    def __new__(cls, device: str) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, (2,), device=device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError("nothing is computed with it")


class Kernel:
    """What is launched, and where: (grid, current device, arguments)."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *a, **n: self.launched.append((grid, torch.cuda.current_device(), a, n))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of several GPUs, on device 0; every visit to another is kept."""
    at, visits = [0], []

    @contextlib.contextmanager
    def device(where: torch.device) -> Iterator[None]:
        visits.append(where.index)
        at.append(where.index)
        yield
        at.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return visits


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", "every_op"]
    command = [*forked.python("interpreter"), "-m", "pytest", *options, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) == len(TRITON_OPS), result.stdout


def test_a_launch_goes_to_the_device_of_its_tensors(current: list[int]) -> None:
    kernel, x = Kernel(), On("cuda:1")
    placed("gelu", kernel)[(3, 2)](x, None, 7, y=On("cuda:1"))
    placed("gelu", kernel)[(1,)](7, y=x)
    assert [(grid, at) for grid, at, _, _ in kernel.launched] == [((3, 2), 1), ((1,), 1)] and current == [1, 1]
    assert kernel.launched[0][2][0] is x and torch.cuda.current_device() == 0


def test_nothing_is_switched_where_the_device_is_current_already(current: list[int]) -> None:
    kernel = Kernel()
    placed("gelu", kernel)[(1,)](On("cuda:0"), 3)
    placed("gelu", kernel)[(1,)](torch.ones(2), 3)
    placed("gelu", kernel)[(1,)](3)
    assert [at for _, at, _, _ in kernel.launched] == [0, 0, 0] and not current


@pytest.mark.parametrize("others", [("cuda:0",), ("cpu",), ("cuda:1", "cuda:0")])
def test_tensors_on_two_devices_are_refused(current: list[int], others: tuple[str, ...]) -> None:
    kernel = Kernel()
    with pytest.raises(ValueError, match=f"gelu: its tensors are on two devices, cuda:1 and {others[-1]}"):
        placed("gelu", kernel)[(1,)](On("cuda:1"), *map(On, others[:-1]), y=On(others[-1]))
    assert not kernel.launched and device_of("gelu", (1, None)) is None


def launches(source: str) -> tuple[int, list[str]]:
    """How many launches of a file are `placed`, and those that are not."""
    tree = ast.parse(source)
    jitted = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    good, bad = 0, []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript):
            continue
        base = node.value
        if isinstance(base, ast.Call) and ast.unparse(base.func) == "placed":
            good += 1
        elif (isinstance(base, ast.Name) and base.id in jitted) or "triton_kernels" in ast.unparse(base):
            bad.append(ast.unparse(base))
    called = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    names = [ast.unparse(f.value) for f in called]
    bad += [name for name in names if not name.startswith("placed(") and name != "primal.LIBRARIES" and name not in bad]
    return good, bad


def test_every_launch_in_the_sources_is_placed() -> None:
    found = {path: launches(path.read_text()) for path in TRITON}
    assert not [(path, bad) for path, (_, bad) in found.items() if bad]
    placed = {path.parent.name for path, (count, _) in found.items() if count}
    assert placed >= set(TRITON_OPS), found


@pytest.mark.parametrize(
    "source",
    [
        "@triton.jit\ndef f(x): pass\ndef g(x):\n    f[(1,)](x)",
        "@triton.jit(do_not_specialize=A)\ndef f(x): pass\ndef g(x):\n    run = f[(1,)]\n    run(x)",
        "def g(x):\n    getattr(triton_kernels, 'forward')[grid](x)",
        "from elsewhere import kernel\ndef g(x):\n    kernel[grid](x)",
    ],
)
def test_a_bare_launch_is_found(source: str) -> None:
    assert launches(source)[1]


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter in a process of its own")
@pytest.mark.parametrize("op", TRITON_OPS)
def test_every_op_launches_there(op: str, current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward with the tensors taken to be on another GPU than the current one."""
    from triton.runtime.interpreter import GridExecutor

    ran = []
    run = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda *a, **n: (ran.append(torch.cuda.current_device()), run(*a, **n))[1]
    )
    monkeypatch.setattr(launch, "device_of", lambda op, arguments: torch.device("cuda", 1))
    inputs, leaves = with_leaves(op, cases_of(op).inputs(cases_of(op).CASES[0]))
    results = [y for y in outputs(op, implementation(op, "triton"), inputs) if y.requires_grad]
    forward = len(ran)
    if leaves:
        torch.autograd.grad([y.sum() for y in results], leaves)
    assert forward and set(ran) == {1} and current == [1] * len(ran)
    assert len(ran) > forward or not leaves or op.endswith("_loss")  # a loss writes its gradient in the forward launch
