"""The native ops find torch's CUDA stream, or say that they do not: with a planted libtorch_cuda.so, without a GPU.

The library of the emulation has the CUDA key of every op, as one that was built with nvcc has: what is asked of it before the
first launch is the same.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from cmt_kernels._native import build

from tests.fixtures import forked
from tests.kernels import emulated

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda.so of its own"),
]
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }\n'
ASK = """
import ctypes, os, sys
import torch
if len(sys.argv) > 1:
    library = ctypes.CDLL(sys.argv[1], int(sys.argv[2]))
from cmt_kernels import _native, available, use
from cmt_kernels._op import _resolve
print(_native.unavailable("cuda"))
print(_native.devices)
print(available("gelu", "cuda")[0])
print(_native.unavailable("cpu"))
if "native" not in available("gelu", "cuda"):
    try:
        with use("gelu:native"):
            _resolve("gelu", "cuda")
    except RuntimeError as refusal:
        print(refusal)
"""


@pytest.fixture(scope="module", autouse=True)
def library() -> Path:
    return emulated.library()


def planted(folder: Path, source: str = STREAM, soname: str = "libtorch_cuda.so") -> Path:
    """A library in a folder that nothing searches; its name there is not what it calls itself."""
    (folder / "stream.cpp").write_text(source)
    command = [build.compiler(), "-shared", "-fPIC", f"-Wl,-soname,{soname}", str(folder / "stream.cpp")]
    build.run([*command, "-o", str(folder / "planted.so")])
    return folder / "planted.so"


def ask(*arguments: str) -> list[str]:
    """What a fresh process with the library of the emulation says, line by line."""
    env = os.environ | emulated.environment()
    done = subprocess.run([*forked.python("torch"), "-c", ASK, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_library_that_was_loaded_locally_is_found(tmp_path: Path) -> None:
    library = planted(tmp_path)
    for mode in (os.RTLD_LOCAL | os.RTLD_NOW, os.RTLD_GLOBAL | os.RTLD_NOW):
        reason, devices, chosen, cpu = ask(str(library), str(mode))
        assert reason == cpu == "None" and devices == "('cpu', 'cuda')" and chosen == "native"


def test_the_symbol_may_be_in_any_library_that_all_can_see(tmp_path: Path) -> None:
    library = planted(tmp_path, soname="libother.so")
    assert ask(str(library), str(os.RTLD_GLOBAL | os.RTLD_NOW))[0] == "None"
    assert "finds no CUDA stream" in ask(str(library), str(os.RTLD_LOCAL | os.RTLD_NOW))[0]


@pytest.mark.parametrize("loaded", [False, True], ids=["not loaded", "without the function"])
def test_where_it_is_not_found_another_backend_runs_and_the_reason_is_said(tmp_path: Path, loaded: bool) -> None:
    library = planted(tmp_path, "int nothing;\n") if loaded else planted(tmp_path)
    reason, devices, chosen, cpu, refusal = ask(*([str(library), str(os.RTLD_NOW)] if loaded else []))
    assert f"finds no CUDA stream to launch them on: torch {torch.__version__} has loaded no libtorch_cuda.so" in reason
    assert devices == "('cpu',)" and cpu == "None" and chosen != "native"
    assert refusal == f"CMT_KERNELS asks for native of gelu: {reason}"
