"""What is faster on this processor: timed once, remembered, never trusted; and attention of few tokens by that choice."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from cmt_kernels import Dual, attention, processor, remembered, use
from cmt_kernels.attention import reference, small
from cmt_kernels.cases import allowed, error

SHAPE = {"T16 d8 float32": small.PLAIN, "T16 d8 bfloat16": small.PLAIN}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A machine of which nothing is known, where things may be timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CMT_PROCESSOR", raising=False)
    monkeypatch.setattr(processor, "_known", {})
    return remembered.path(processor.FILE)


def clocked(monkeypatch, usual: float, other: float):
    """Two calls that take as long as is said by a clock of their own, and how often they ran."""
    now, runs = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            runs.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(processor.measure, "__defaults__", (lambda: now[0],))
    return call("usual", usual), call("other", other), runs


def test_the_ratio_is_the_median_of_turns(monkeypatch) -> None:
    usual, other, runs = clocked(monkeypatch, 3.0, 2.0)
    assert processor.measure(usual, other) == pytest.approx(1.5)
    assert len(runs) == 2 * (processor.ROUNDS + 2)
    assert all({a, b} == {"usual", "other"} for a, b in zip(runs[::2], runs[1::2]))
    assert {runs[i] for i in range(0, len(runs), 2)} == {"usual", "other"}  # each is first in its turn
    stalled, turn = iter([0.0] * 3 + [90.0] + [0.0] * 99), [0.0]
    monkeypatch.setattr(processor.measure, "__defaults__", (lambda: turn[0],))
    slow = lambda: turn.__setitem__(0, turn[0] + 3.0 + next(stalled))
    quick = lambda: turn.__setitem__(0, turn[0] + 2.0)
    assert processor.measure(slow, quick) == pytest.approx(1.5)  # one stall beside it decides nothing


def test_it_is_timed_once_a_machine(home, monkeypatch) -> None:
    usual, other, runs = clocked(monkeypatch, 3.0, 2.0)
    assert processor.ratio("a", usual, other) == processor.ratio("a", usual, other) == pytest.approx(1.5)
    once = len(runs)
    assert json.loads(home.read_text()) == {processor.machine(): {"a": {"ratio": pytest.approx(1.5)}}}
    processor._known.clear()  # the next process
    assert processor.ratio("a", usual, other) == pytest.approx(1.5) and len(runs) == once
    processor.ratio("b", usual, other)
    assert len(runs) == 2 * once
    line = processor._line
    others = (("model", lambda: "another"), ("_line", lambda name: "fpu vme" if name == "flags" else line(name)))
    for name, changed in others:
        with monkeypatch.context() as patch:
            patch.setattr(processor, name, changed)
            processor.ratio("a", usual, other)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        processor.ratio("a", usual, other)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        processor.ratio("a", usual, other)
    assert len(runs) == 6 * once


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"x": 1}', '{"M": 3}', '{"M": {"a": 4}}', '{"M": {"a": {}}}',
             '{"M": {"a": {"ratio": "9"}}}', '{"M": {"a": {"ratio": NaN}}}', '{"M": {"a": {"ratio": Infinity}}}',
             '{"M": {"a": {"ratio": -2}}}', '{"M": {"a": {"ratio": true}}}', '{"M": {"a": {"ratio": [9]}}}', "\xff"],
)  # fmt: skip
def test_a_broken_or_foreign_file_is_made_anew(text, home, monkeypatch) -> None:
    usual, other, _ = clocked(monkeypatch, 3.0, 2.0)
    home.parent.mkdir(parents=True)
    home.write_bytes(text.replace("M", processor.machine()).encode("latin-1"))
    assert processor.ratio("a", usual, other) == pytest.approx(1.5)
    assert json.loads(home.read_text())[processor.machine()]["a"] == {"ratio": pytest.approx(1.5)}


def test_nothing_is_timed_where_that_is_asked(home, monkeypatch) -> None:
    monkeypatch.setattr(processor, "measure", lambda *_: pytest.fail("timed"))
    monkeypatch.setenv("CMT_PROCESSOR", "usual")
    assert small.choose(16, 8, torch.float32) == small.SDPA and not home.exists()
    monkeypatch.setenv("CMT_PROCESSOR", "fastest")
    with pytest.raises(ValueError, match="CMT_PROCESSOR names 'fastest'; the choice is usual"):
        small.choose(16, 8, torch.float32)


def test_the_choice_follows_the_measurement(monkeypatch) -> None:
    for ratio, want in ((0.5, small.SDPA), (processor.WORTH - 0.01, small.SDPA), (processor.WORTH, small.PLAIN)):
        with monkeypatch.context() as patch:
            patch.setattr(processor, "ratio", lambda label, *_, found=ratio: found)
            assert small.choose(16, 8, torch.bfloat16) == want
            assert small.choose(small.TOKENS + 1, 8, torch.float32) == small.SDPA  # many tokens are not asked


def test_the_real_one_runs_and_leaves_no_gradient(home) -> None:
    assert small.choose(4, 8, torch.float32) in small.NAMES
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert small.speed(4, 8, torch.bfloat16) > 0
    kept = json.loads(home.read_text())[processor.machine()]
    assert {label: entry["ratio"] > 0 for label, entry in kept.items()} == {
        "attention T4 d8 float32": True,
        "attention T4 d8 bfloat16": True,
    }


# ------------------------------------------------------------------------------------------- attention by choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_attention_is_the_formula_with_its_gradient_and_tangent(dtype, monkeypatch) -> None:
    """Against float64, error at most twice SDPA's; a Dual's value has the bits of the plain call; other shapes are SDPA's."""
    asked, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(reference.F, "scaled_dot_product_attention", lambda *a: asked.append(1) or sdpa(*a))
    qkv = torch.randn(6, 16, 3, 2, 8, dtype=torch.float64)
    do, dot = torch.randn(6, 16, 16, dtype=torch.float64), torch.randn(6, 16, 3, 2, 8, dtype=torch.float64)

    def run(x, k):
        leaf = x.clone().requires_grad_()
        y = attention(leaf if k is None else Dual(leaf, dot[:k].to(x.dtype)))
        (y if k is None else y.value).backward(do.to(x.dtype))
        return [y.detach() if k is None else y.value.detach(), leaf.grad] + ([] if k is None else [y.tangent])

    with use("reference"):
        exact, usual = run(qkv, 6), run(qkv.to(dtype), 6)
        assert asked
        asked.clear()
        with small.using(SHAPE):
            plain = run(qkv.to(dtype), None)
            for k in (0, 1, 6):
                found = run(qkv.to(dtype), k)
                assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
            assert not asked
            for y, u, e in zip(found, usual, exact, strict=True):
                assert error(y, e) <= allowed(u, e)
            attention(qkv[:, :15].to(dtype))
            assert asked
        asked.clear()
        assert all(torch.equal(a, b) for a, b in zip(run(qkv.to(dtype), 6), usual)) and asked  # outside as before
    assert not torch.equal(plain[0], usual[0])  # the two differ in last bits: why a stage keeps its choice


def test_a_choice_that_is_none_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="attention by 'flash'; the choices are softmax, sdpa"),
        small.using({"T4": "flash"}),
    ):
        pass
