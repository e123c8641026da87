"""Weights that are cast once a step and gradients that are added where they are kept, beside autocast's own way.

On a GPU the local engine does so by itself; here it is told to.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cmt_kernels import Dual
from torch.utils._python_dispatch import TorchDispatchMode

from cmt_fast.config.schema import Denoise, Stage
from cmt_fast.engine import LocalEngine
from cmt_fast.models.dit import DiT

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] * (d == "cuda")) for d in DEVICES]
)


def engine(device: str, lends: bool, accumulated: int = 1, **more) -> LocalEngine:
    torch.manual_seed(0)
    net = DiT(1, 4, 3, width=32, depth=2, heads=2, two_times=True, **more)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # the gates are open
    return LocalEngine(
        net, Stage(objective=Denoise(), images_nimg=1000, precision="bf16"), torch.device(device), accumulated, lends
    )


def batch(device: torch.device, seed: int = 0) -> tuple:
    torch.manual_seed(seed)
    x, x_dot, t, labels = torch.randn(6, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.rand(6), torch.randint(3, (6,))
    duals = Dual(x, x_dot), Dual(t, torch.ones(2)), Dual(t / 2, torch.zeros(2))
    return *(Dual(*(y.to(device) for y in dual)) for dual in duals), labels.to(device)


def gradients(e: LocalEngine) -> torch.Tensor:
    """Of every part of a step, with a forward that keeps no gradient between them."""
    for part in range(e.grad_accum_steps):
        u = e(*batch(e.device, part))
        with torch.no_grad():
            e(*batch(e.device, part))
        e.backward((u.value - u.tangent.mean()).square().mean())
    return e.g


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_autocast_s_to_its_rounding(device: str, accumulated: int, checkpointed: bool) -> None:
    ours, theirs = (engine(device, lends, accumulated, checkpoint_activations=checkpointed) for lends in (True, False))
    exact = engine(device, False, accumulated)
    exact.stage = Stage(objective=Denoise(), images_nimg=1000, precision="fp32")
    truth = gradients(exact)
    distance = lambda g: float((g - truth).norm() / truth.norm())
    plain = distance(gradients(theirs))
    assert 0 < distance(gradients(ours)) <= 1.1 * plain < 0.05


def test_values_and_tangents_are_autocast_s_to_the_bit(device: str) -> None:
    ours, theirs = (engine(device, lends)(*batch(torch.device(device))) for lends in (True, False))
    assert torch.equal(ours.value, theirs.value) and torch.equal(ours.tangent, theirs.tangent)


def test_copies_follow_the_weights(device: str) -> None:
    e = engine(device, True)
    for _ in range(3):
        gradients(e)
        e.step(1e-2)
        assert torch.equal(e.half, e.p.bfloat16()) and not e.g.any()
    other = engine(device, True)
    other.load(e.state(), e.step_count)
    assert torch.equal(other.half, e.p.bfloat16())
    again = engine(device, True)
    again.start_from(e.state()["model"])
    assert torch.equal(again.half, e.p.bfloat16())


def test_a_copy_of_the_network_borrows_nothing(device: str) -> None:
    e = engine(device, True)
    for net in (e.average(), e.copy(), copy.deepcopy(e.net)):
        assert not any(hasattr(p, "lent") for p in net.parameters())
    assert all(hasattr(p, "lent") for p in e.net.blocks.parameters())


def test_a_frozen_weight_gets_no_gradient(device: str) -> None:
    e = engine(device, True)
    frozen = e.net.blocks[0].fc1.weight
    frozen.requires_grad_(False)
    gradients(e)
    assert not frozen.grad.any() and e.net.blocks[1].fc1.weight.grad.any()


def test_a_second_derivative_is_refused(device: str) -> None:
    e = engine(device, True)
    x, t, r, labels = batch(e.device)
    x.value.requires_grad_()
    (g,) = torch.autograd.grad(e(x, t, r, labels).value.sum(), x.value, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="once_differentiable|second derivative"):
        g.square().sum().backward()


class Casts(TorchDispatchMode):
    """Counts casts of weights and of their gradients."""

    def __init__(self, e: LocalEngine) -> None:
        super().__init__()
        self.shapes, self.count = {p.shape for p in e.net.blocks.parameters() if p.ndim == 2}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return function(*args, **(kwargs or {}))


def test_no_weight_and_no_gradient_is_cast(device: str) -> None:
    found = {}
    for lends in (True, False):
        e = engine(device, lends)
        with Casts(e) as casts:
            gradients(e)
        found[lends] = casts.count
    weights = 5 * 2  # linears of two blocks
    assert found == {True: 0, False: 3 * weights}  # forward, forward without gradients, and the gradient
