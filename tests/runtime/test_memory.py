"""What a step frees is there for the next: counted in pages that the system hands out, in a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmt_fast.cli import main
from cmt_fast.runtime import memory
from tests.fixtures.tiny import NO_EVAL, SMALL

COUNT = """
import resource, sys, torch
from cmt_fast.runtime import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers = [m for _ in range(4) for m in (torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))]
net, x, big = torch.nn.Sequential(*layers), torch.randn(1024, 128), torch.randn(12_000_000)
def step():
    net(x).square().sum().backward()
    big + 1  # 48 MB, beyond what the heap serves by default
for _ in range(3):
    step()
before = pages()
for _ in range(20):
    step()
print(pages() - before)
"""


def faults(how: str) -> int:
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), str(root / "kernels")))
    run = [sys.executable, "-c", COUNT, how]
    return int(subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_pages_are_not_handed_out_again_every_step() -> None:
    now, kept = faults("as it is"), faults("keep")
    assert kept * 20 < now, (kept, now)


def test_where_there_is_no_glibc_nothing_is_done(monkeypatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    assert memory.keep_freed() is False


def test_cmt_train_on_a_cpu_keeps_it(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "keep_freed", lambda: asked.append(1) or True)
    short = [*SMALL, *NO_EVAL, "pre.images_nimg=64", "eval.n=20", "device=cpu"]
    assert main(["train", "digits", *short, "--stages", "pre", "--out", str(tmp_path / "run")]) == 0
    assert asked == [1] and torch.get_num_threads() == 1
