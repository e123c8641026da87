"""Where memory ends: the error names the stage, its parts and settings that fit, by the arithmetic that `cmt estimate` prints."""

from __future__ import annotations

import errno
import re

import pytest
import torch

from cmt_fast import cli
from cmt_fast.config import fingerprint, loading
from cmt_fast.cost import estimate, fitting
from cmt_fast.cost.hardware import CARDS
from cmt_fast.runtime import exits, memory
from cmt_fast.storage import checkpoint
from cmt_fast.train import batches, monitor
from tests.fixtures.tiny import NO_EVAL, SMALL

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.19 GiB is free. "
    "Including non-PyTorch memory, this process has 77.9 GiB memory in use."
)


def case(gigabytes: float, processes: int, recipe: str, stage: str, *more: str) -> fitting.Case:
    run = loading.load(recipe, list(more))
    return fitting.Case(run, stage, estimate.rows_of(run), CARDS["h100"]._replace(memory=gigabytes * 1e9), processes)


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError(CUDA), f"the device refused 2.50 GiB ({CUDA[48:113]})"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
    (MemoryError(), "MemoryError"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    (OSError(errno.ENOSPC, "No space left on device"), None),
    (ValueError("out of memory"), None),
])  # fmt: skip
def test_what_means_that_memory_has_ended(error, said):
    assert memory.ran_out(error) == said


def test_the_hosts_own_refusal_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert memory.ran_out(error.value) == "the host refused 4.612e+09 GB"


def planted(monkeypatch, moment: str) -> None:
    """Memory ends in the twelfth step, or in the first evaluation."""
    draw = batches.BatchProvider.draw

    def fails(*_):
        torch.empty(1 << 60)

    if moment == "an evaluation":
        return monkeypatch.setattr(monitor, "observe", fails)
    monkeypatch.setattr(
        batches.BatchProvider, "draw", lambda self, now, part=0: fails() if now == 12 else draw(self, now, part)
    )


@pytest.mark.parametrize("moment, setting", [("a step", "pre.micro_batch=16"), ("an evaluation", "eval.batch=500")])
def test_the_command_says_what_would_fit_and_goes_on_by_it(moment, setting, monkeypatch, capsys, tmp_path):
    """A step that the host refuses, after a checkpoint: one line, its own exit code, and the setting that it names is valid."""
    more = ["pre.checkpoint_every_nimg=320", "pre.eval_every_nimg=512", "pre.grid_every_nimg=null"]
    command = [
        "train",
        "digits",
        *SMALL,
        *NO_EVAL,
        *more,
        "device=cpu",
        "--stages",
        "pre",
        "--out",
        str(tmp_path / "run"),
    ]
    with monkeypatch.context() as patch:
        planted(patch, moment)
        assert cli.main(command) == exits.OUT_OF_MEMORY
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"cmt: pre: out of memory in {moment}: the host refused 4.612e+09 GB"), lines
    assert "MB forwards without gradient" in lines[-1] or "MB samples, 1000 at once" in lines[-1]
    assert f"would fit: {setting} (" in lines[-1]
    step = checkpoint.steps(tmp_path / "run" / "pre")[-1]
    assert f"step {step} is on disk" in lines[-1]
    if moment == "a step":
        assert cli.main([*command, setting]) == 0
        assert "resumes at step 10 of 20" in capsys.readouterr().out


WIDE = ["mid.micro_batch=null", "mid.trajectories.rollout_batch=320", "eval.batch=50"]


@pytest.mark.parametrize("megabytes, processes, count", [(95, 1, 3), (75, 2, 5), (60, 1, 1)])
def test_every_setting_that_is_named_fits_by_the_estimate(megabytes, processes, count):
    """Alone where one is enough, else together; none is named that is not needed."""
    whole = case(megabytes / 1e3, processes, "digits", "mid", *WIDE)
    text = fitting.told(whole, "a step")
    assert not whole.held(whole.run).fits and "would fit" in text, text
    named = re.findall(r"(?:: |or )((?:[\w.]+=\S+ )+)\(([\d.]+) [GM]B\)", text.split("would fit")[1])
    assert len(named) >= count, text
    for setting, held in named:
        now = whole.held(loading.load("digits", [*WIDE, *setting.split()]))
        assert now.fits and float(held) in (
            pytest.approx(now.most / 1e6, abs=0.06),
            pytest.approx(now.most / 1e9, abs=0.06),
        )


@pytest.mark.parametrize("begun", [(), ("pre",), ("pre", "mid")])
def test_a_run_that_has_begun_is_told_first_with_what_it_goes_on(begun):
    """Rows of a rollout at once and of a round are settings of mid: it goes on with other micro-batches alone."""
    whole = case(0.095, 1, "digits", "mid", *WIDE)._replace(begun=begun)
    named = fitting.told(whole, "a step").split("would fit: ")[1].split("; or ")
    new = [text.endswith("in a new folder") for text in named]
    assert new == sorted(new) and not new[0] and any(new) == ("mid" in begun)
    for text, refused in zip(named, new):
        run = loading.load("digits", [*WIDE, *text.partition(" (")[0].split()])
        differ = [name for name in begun if fingerprint.content(run, name) != fingerprint.content(whole.run, name)]
        assert bool(differ) == refused, text


def test_where_no_setting_fits_it_says_by_what_more_processes_would():
    alone = case(0.03, 1, "digits", "mid", *WIDE)
    text = fitting.told(alone, "its start")
    named, n = re.search(r"No setting fits on 1; (.*) on (\d+) processes would", text).groups()
    assert int(n) > 1
    wider = alone._replace(processes=int(n))
    assert wider.held(loading.load("digits", [*WIDE, *named.split()])).fits, named
    assert "take a smaller model" in fitting.told(alone._replace(card=alone.card._replace(memory=1e5)), "a step")
