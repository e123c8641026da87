"""The benches of what a process is left with: a small part of their runs, and what they must not overlook."""

from __future__ import annotations

import json

import pytest

from bench.safety import resume, soak
from cmt_fast.runtime.leftovers import Handles
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.train.steps import Sums

FLAT = Handles(files=7, threads=4, children=0, groups=0, memory=350_000_000, tensors=72, events=0)


def test_a_stage_goes_on_from_a_step_to_the_same_bits_and_another_is_seen(tmp_path, monkeypatch):
    """bf16, in the middle of a row of metrics, to the next step; without what the checkpoint keeps of that row, or with
    another row before it, it is another run."""
    source, again = tmp_path / "whole", tmp_path / "again"
    monkeypatch.setattr(resume, "STEPS", 8)
    resume.whole("bf16", source, ["pre"])
    assert resume.resumed("bf16", source, "pre", 7, again, 8) and checkpoint.steps(again / "pre") == [7, 8]
    file = again / "pre" / metrics_log.METRICS
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    rows[0]["loss"] += 1e-9
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resume.bits(source / "pre", 8) != resume.bits(again / "pre", 8)
    with monkeypatch.context() as patch:
        begins = Sums.__init__
        patch.setattr(Sums, "__init__", lambda self, found: begins(self, None))
        assert not resume.resumed("bf16", source, "pre", 7, again, 8)


@pytest.mark.parametrize("key", ["files", "threads", "tensors", "events"])
def test_what_is_never_closed_is_seen_and_what_a_save_holds_is_not(key):
    saving = [FLAT._replace(files=8, threads=4 + i % 2) if i % 3 else FLAT for i in range(40)]
    assert soak.grown(saving)["more"] == []
    growing = [x._replace(**{key: getattr(x, key) + i // 4}) for i, x in enumerate(saving)]
    assert key in soak.grown(growing)["more"]


def test_memory_is_compared_after_the_warm_up():
    rising = [FLAT._replace(memory=FLAT.memory + 300_000 * max(0, i - 8)) for i in range(40)]
    early = [FLAT._replace(memory=FLAT.memory - 50_000_000 * (i < 4)) for i in range(40)]
    assert soak.grown(rising)["grown_mb"] > soak.GROWTH_MB and soak.grown(early)["grown_mb"] == 0
