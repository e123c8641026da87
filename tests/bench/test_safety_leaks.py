"""The benches of what a process is left with: a small part of their runs, and what they must not overlook."""

from __future__ import annotations

import json

import pytest

from bench.safety import resume, soak
from cmt_fast.runtime.leftovers import Handles
from cmt_fast.storage import metrics_log

FLAT = Handles(files=7, threads=4, children=0, groups=0, memory=350_000_000, tensors=72, events=0)


def test_a_stage_goes_on_from_a_step_to_the_same_bits_and_another_is_seen(tmp_path, monkeypatch):
    """bf16, in the middle of a row of metrics; with another row of metrics in the place of one it is another run."""
    source = tmp_path / "whole"
    monkeypatch.setattr(resume, "STEPS", 12)
    resume.whole("bf16", source, ["pre"])
    assert resume.resumed("bf16", source, "pre", 7, tmp_path / "again")
    file = source / "pre" / metrics_log.METRICS
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["loss"] += 1e-9
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resume.bits(source / "pre") != resume.bits(tmp_path / "again" / "pre")


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
