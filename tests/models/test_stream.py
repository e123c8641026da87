"""precision bf16-stream: the residual stream of a DiT in bf16 too, in training alone."""

from __future__ import annotations

import pytest
import torch
from cmt_kernels import Dual
from torch import Tensor

from cmt_fast import engine
from cmt_fast.config.loading import load
from cmt_fast.config.schema import Denoise, Stage
from cmt_fast.engine import LocalEngine, ShardingPlan
from cmt_fast.models.dit import DiT

CPU = torch.device("cpu")


def built(precision: str, **more) -> LocalEngine:
    torch.manual_seed(0)
    net = DiT(1, 4, 3, width=32, depth=3, heads=2, two_times=True, **more)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # the gates are open
    return LocalEngine(net, Stage(objective=Denoise(), images_nimg=1000, precision=precision), CPU)


def batch() -> tuple:
    torch.manual_seed(1)
    x, t, labels = torch.randn(6, 1, 4, 4), torch.rand(6), torch.randint(3, (6,))
    return Dual(x, torch.randn(2, 1, 4, 4)), Dual(t, torch.ones(2)), Dual(t / 2, torch.zeros(2)), labels


def streams(e: LocalEngine) -> set[torch.dtype]:
    """The dtypes of what the blocks are given."""
    found = set()
    for block in e.net.blocks:
        block.register_forward_pre_hook(lambda _, given: found.update(x.dtype for x in given[0]))
    e(*batch())
    return found


def test_the_stream_is_in_bf16_where_it_is_asked_for() -> None:
    assert streams(built("bf16-stream")) == {torch.bfloat16}
    assert torch.float32 in streams(built("bf16")) and streams(built("fp32")) == {torch.float32}


@pytest.mark.parametrize("norm, mlp", [("layer", "gelu"), ("rms", "swiglu")])
def test_value_tangent_and_gradient_err_as_bf16_does(norm: str, mlp: str) -> None:
    """A stream in bf16 costs some digits of bf16, not a term: no more than the branches' own rounding in every block."""

    def answers(precision: str) -> list[Tensor]:
        e = built(precision, norm=norm, mlp=mlp)
        u = e(*batch())
        e.backward(u.value.square().mean())
        return [u.value.detach(), u.tangent, e.g]

    exact, narrow = answers("fp32"), answers("bf16-stream")
    for y, truth in zip(narrow, exact, strict=True):
        error = float((y - truth).norm() / truth.norm())
        assert 0 < error < 3 * 2 * 2.0**-8  # blocks x branches x a rounding of bf16


def test_evaluation_stays_in_fp32() -> None:
    e = built("bf16-stream")
    x, t, r, labels = batch()
    plain = built("fp32")
    arguments = x.value, t.value, r.value, labels
    assert torch.equal(e.average()(*arguments), plain.average()(*arguments))


def test_a_network_without_such_a_stream_is_refused() -> None:
    run = load("gmm", ["pre.precision=bf16-stream"])
    with pytest.raises(ValueError, match="precision.*'bf16-stream' is of a residual stream of tokens.*mlp take 'bf16'"):
        engine.check(run, "pre", run.stages["pre"], ShardingPlan(None, False, 0, 0, 0, ""), CPU)
