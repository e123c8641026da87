"""What a process is left with is listed: planted changes one by one, and none by training, judging, reporting, sampling."""

from __future__ import annotations

import builtins
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as hooks

from cmt_fast.cli import main
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import leftovers
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny


def patched(place, name, monkeypatch) -> None:
    own = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **more: own(*args, **more))


# what is left -> the beginning of the line that names it
PLANTED = {
    "torch.nn.functional.linear is": lambda m: patched(functional, "linear", m),
    "torch.nn.modules.linear.Linear.forward is": lambda m: patched(nn.Linear, "forward", m),
    "torch.empty is": lambda m: patched(torch, "empty", m),
    "builtins.print is": lambda m: patched(builtins, "print", m),
    "default dtype": lambda m: torch.set_default_dtype(torch.float64),
    "default device": lambda m: torch.set_default_device("meta"),
    "autocast on cpu": lambda m: torch.set_autocast_enabled("cpu", True),
    "autocast cache": lambda m: torch.set_autocast_cache_enabled(False),
    "nested autocasts": lambda m: torch.autocast_increment_nesting(),
    "grad mode": lambda m: torch.set_grad_enabled(False),
    "hooks on all modules": lambda m: hooks.register_module_forward_hook(lambda *_: None),
    "deterministic algorithms": lambda m: torch.use_deterministic_algorithms(True),
    "TF32 in matmuls": lambda m: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "torch's random generator": lambda m: torch.rand(1),
    "Python's random generator": lambda m: random.random(),
    "numpy's random generator": lambda m: np.random.rand(),
    "variable CMT_PLANTED": lambda m: os.environ.__setitem__("CMT_PLANTED", "1"),
    "handler of SIGUSR1": lambda m: signal.signal(signal.SIGUSR1, lambda *_: None),
    "excepthook": lambda m: setattr(sys, "excepthook", lambda *_: None),
}  # fmt: skip


@pytest.fixture
def put_back(monkeypatch):
    """Undo what PLANTED leaves."""
    hook, handler, mode = sys.excepthook, signal.getsignal(signal.SIGUSR1), hooks._global_forward_hooks.copy()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.pop("CMT_PLANTED", None)
    sys.excepthook = hook
    signal.signal(signal.SIGUSR1, handler)
    hooks._global_forward_hooks.clear()
    hooks._global_forward_hooks.update(mode)
    while (nested := torch.autocast_decrement_nesting()) > 0:
        pass
    while nested < 0:  # below 0 the cache of casts would never be cleared again
        nested = torch.autocast_increment_nesting()


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_left_behind_is_named(what, monkeypatch, put_back):
    before = leftovers.Process()
    assert before.changed(leftovers.Process()) == []
    PLANTED[what](monkeypatch)
    left = [line for line in before.changed(leftovers.Process()) if not line.startswith("modes of")]
    monkeypatch.undo()
    # torch says the default dtype and TF32 in two ways each
    assert any(line.startswith(what) for line in left) and len(left) <= 2, left


def test_a_stage_that_leaves_something_says_so(capsys, monkeypatch, tmp_path):
    def spoiled(*_):
        monkeypatch.setattr(functional, "linear", lambda *args: None)

    monkeypatch.setattr(loop, "train_stage", spoiled)
    loop.train(Workspace(tiny(), tmp_path), ["pre"])
    said = capsys.readouterr().out
    assert "pre left behind in this process" in said and "torch.nn.functional.linear is" in said


def test_what_loggers_compilers_and_a_first_use_of_cuda_leave_is_no_warning(monkeypatch, put_back):
    """They are listed where all is asked for; a variable that kernels read is still warned of."""
    before = leftovers.Process()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/triton")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp")
    sys.excepthook = lambda *_: None
    signal.signal(signal.SIGUSR1, lambda *_: None)
    random.random()
    after = leftovers.Process()
    after.randoms["CUDA's random generator"] = 1
    assert len(before.changed(after)) == 6 and before.changed(after, all_of_it=False) == []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    left = before.changed(leftovers.Process(), all_of_it=False)
    assert len(left) == 1 and left[0].startswith("variable CUBLAS_WORKSPACE_CONFIG"), left


def test_training_judging_reporting_and_sampling_leave_nothing(tmp_path):
    """bf16 with an evaluation on the way; all beside the beginning, and handles from one round to the next."""
    work = Workspace(tiny("digits", "mid.precision=bf16", "mid.eval_every_nimg=320"), tmp_path / "run")
    before, rounds = leftovers.Process(whole=True), []
    for _ in range(2):
        loop.train(work, ["pre", "mid"])
        assert rounds or main(["report", str(work.folder)]) == 0
        assert rounds or main(["sample", str(work.folder / "mid"), "-n", "4", "--out", str(tmp_path / "x.npz")]) == 0
        assert before.changed(leftovers.Process(whole=True)) == []
        rounds.append(leftovers.Handles.now())
        for stage in ("pre", "mid"):
            (work.folder / stage / "checkpoints").rename(tmp_path / f"{stage}-{len(rounds)}")
    first, second = rounds
    assert (first.files, first.threads, first.children) == (second.files, second.threads, second.children)
