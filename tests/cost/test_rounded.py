"""Rows that 16 bits do not resolve: their share is the measured one, and they cost and hold what fp32 does."""

from __future__ import annotations

import json

import pytest

from cmt_fast.config import loading
from cmt_fast.cost import estimate, gap, memory, plan, rounded
from cmt_fast.cost.flops import AS_IT_RUNS, terms
from cmt_fast.cost.hardware import CARDS
from cmt_fast.cost.plan import Machine
from cmt_fast.objectives.rounding import wide_rows
from cmt_fast.run.resolved import resolve
from tests.fixtures.commands import ROOT

TINY = ("model.width=16", "model.depth=1", "model.heads=2")


def cost(*overrides: str) -> tuple[estimate.StageCost, memory.Memory, list]:
    """post of digits on an H100: its bill, its memory and its terms."""
    run = loading.load("digits", overrides)
    rows, resolved = estimate.rows_of(run), resolve(run, "post")
    known, _ = estimate.networks(resolved, rows)
    bill, choice = estimate.bill_of(resolved, rows, known, CARDS["h100"], 1, AS_IT_RUNS)
    held = estimate.held(resolved, rows, known, choice, CARDS["h100"], 1)
    return bill, held, rounded.split(terms(resolved), resolved, 1)


def test_the_shares_are_those_that_were_measured():
    rows = json.loads((ROOT / "bench/results/cpu/rounding.json").read_text("utf-8"))["rows"]
    found: dict[str, dict[float, float]] = {"bf16": {}, "fp16": {}}
    for row in rows:
        if row["part"] == "gradients":
            if row["recipe"] == "gmm":
                found[row["precision"]][row["q"]] = 1.0 if "refused" in row else row["beyond"]
            if "wide" in row:
                batch = loading.load(row["recipe"]).post.batch
                assert wide_rows(row["beyond"], batch) / batch == row["wide"]
    assert {p: dict(known) for p, known in rounded.BEYOND.items()} == found
    assert rounded.beyond("bf16", 1) == 0 and rounded.beyond("bf16", 1e6) == 1
    assert 0.1875 < rounded.beyond("bf16", 128) == pytest.approx((0.1875 + 0.5625) / 2)


def test_rows_beyond_the_limit_cost_and_hold_what_fp32_does():
    limit = "post.objective.q=4096"
    low, held, work = cost(*TINY, limit, "post.precision=bf16")
    full, held_full, _ = cost(*TINY, limit)
    free, held_free, _ = cost(*TINY, limit, "post.precision=bf16", "post.rounding_limit=1e9")
    own = 1 - loading.load("digits").post.anchor.fraction  # rows of the objective; its anchor's compare no two outputs
    assert {t.wide for t in work if t.of == "student"} == {own} and not any(t.wide for t in work if t.of != "student")
    assert free.work_us < low.work_us
    activations = lambda m: next(p.bytes for p in m.parts if p.what.startswith("activations"))
    assert activations(held_free) < activations(held) <= activations(held_full) * 1.01
    assert full.work_us > free.work_us


def test_a_large_consistency_stage_in_bf16_is_dearer_than_in_tf32():
    """By the rule nearly all its rows are in fp32, which products on these cards compute at a seventh of TF32's rate."""
    given = (*TINY, "post.objective.q=1024", "post.anchor.fraction=0.25")
    fast, slow = (cost(*given, f"post.precision={precision}")[0] for precision in ("tf32", "bf16"))
    assert slow.gpu_hours > 1.1 * fast.gpu_hours
    run = loading.load("imagenet512-ecd", ["post.precision=bf16"])
    said = rounded.note(resolve(run, "post"), 8)
    assert "about 100% of its rows are computed in fp32" in said and "rounding.json" in said
    assert not rounded.note(resolve(run, "mid"), 8)  # targets are fixed
    refused = resolve(loading.load("digits", ["post.precision=bf16", "post.objective.q=8192"]), "post")
    assert rounded.refused(refused) and "would be refused" in rounded.note(refused, 1)


def test_fp16_is_planned_at_the_rate_of_bf16_and_without_the_kernels_that_do_not_know_it():
    low = ("mid.precision=fp16", "post.precision=fp16", "post.objective.q=4")
    run = loading.load("digits", [*TINY, *low])
    machine = Machine(CARDS["h100"], 1, estimate.rows_of(run))
    made = plan.plan(run, ["mid", "post"], machine, 1e6)
    assert made.layout.hours > 0 and gap.lines(made, machine)
    bf16 = [text.replace("fp16", "bf16") for text in low]
    assert cost(*TINY, *low)[0].work_us > cost(*TINY, *bf16)[0].work_us
    assert cost(*TINY, *low)[0].optimizer_us == cost(*TINY, *bf16)[0].optimizer_us  # its numbers are fp32
    compiled = ["post.compile=true"]
    assert cost(*TINY, *low, *compiled)[0].work_us == pytest.approx(cost(*TINY, *bf16, *compiled)[0].work_us)
