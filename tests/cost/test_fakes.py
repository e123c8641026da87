"""The count on tensors without numbers, against the same count on torch's own fakes, which are slow to start."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cmt_kernels import use
from torch._subclasses.fake_tensor import FakeTensorMode

from cmt_fast.cost import activations, fakes
from tests.cost.test_memory import NETWORKS


def torchs_own():
    """What stands for activations.fake: one mode of torch's, whose tensors no other takes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def fake():
        with torch.random.fork_rng(devices=[]), mode:
            yield

    return fake


def counts(name: str, bf16: bool) -> tuple:
    """Bytes and calls of a forward without gradient, and what a forward in training keeps."""
    model, shape, classes = NETWORKS[name]
    forget()
    return tuple(f(model, "ve", shape, classes, bf16) for f in (activations._forward, activations._of_model))


def forget() -> None:
    for function in (activations._forward, activations._of_model, activations._built):
        function.cache_clear()


@pytest.fixture
def afresh():
    """No other test's count meets those of this one, whose ops are others."""
    yield
    forget()


@pytest.mark.parametrize(
    "name, backend, bf16", [("edm", None, True), ("dit", "reference", True), ("mlp", "reference", True)]
)
def test_the_count_is_that_of_torchs_own_fakes(name, backend, bf16, monkeypatch, afresh):
    with use(backend):
        ours = counts(name, bf16)
        monkeypatch.setattr(activations, "fake", torchs_own())
        assert ours == counts(name, bf16)


def dense(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose dimensions lie in memory in this order."""
    back = [order.index(d) for d in range(len(order))]
    return torch.zeros([shape[d] for d in order], dtype=dtype).permute(back)


NHWC = dense((2, 6, 4, 4), (0, 2, 3, 1), torch.float32)
HALF = torch.zeros(2, 6, 4, 4, dtype=torch.bfloat16)
CASES = {
    "broadcast": lambda a, b: a * b[:, :, :1, :1],
    "promoted": lambda a, b: b + a,
    "a number": lambda a, b: b * torch.tensor(2.0),
    "compared": lambda a, b: a > b,
    "turned": lambda a, b: a.transpose(1, 3) * b.transpose(1, 3),
    "with holes": lambda a, b: a[:, ::2, 1:].exp(),
    "one row": lambda a, b: b[:1, :, :1].permute(3, 0, 2, 1).neg(),
    "reduced": lambda a, b: a.mean(dim=(2, 3), keepdim=True) + b.float().sum(),
    "convolved": lambda a, b: torch.nn.functional.conv2d(a, torch.zeros(5, 6, 3, 3), padding=1),
    "pooled": lambda a, b: torch.nn.functional.avg_pool2d(a, 2),
    "joined": lambda a, b: torch.cat([a, b.float()], dim=-3),
    "group norm": lambda a, b: torch.nn.functional.group_norm(b, 2),
    "padded": lambda a, b: torch.nn.functional.pad(b, (1, 0, 0, 2)),
    "copied": lambda a, b: a.to(torch.float64),
    "no rule": lambda a, b: torch.cumsum(b, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_an_op_gives_the_shape_the_dtype_and_the_order_that_it_gives_of_numbers(case):
    real = CASES[case](NHWC, HALF)
    with fakes.Fakes():
        made = CASES[case](NHWC, HALF)
    assert (made.shape, made.dtype, made.device) == (real.shape, real.dtype, real.device)
    assert made.stride() == real.stride() and made.untyped_storage().nbytes() == real.untyped_storage().nbytes()
