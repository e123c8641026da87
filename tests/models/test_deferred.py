"""Networks that are drawn later: parameter by parameter, bit for bit as their constructors draw them."""

from __future__ import annotations

import weakref

import pytest
import torch

from cmt_fast import models
from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp, WideHead
from cmt_fast.models.deferred import deferred

PICTURES, POINTS = (3, 16, 16), (2,)
NETWORKS = {
    "dit": (Dit(width=32, depth=2, heads=2), "linear", PICTURES),
    "dit-ddpm": (Dit(width=32, depth=2, heads=2, precondition="ddpm"), "ve", PICTURES),
    "ditdh": (Dit(width=32, depth=1, heads=2, embeddings="gaussian", wide_head=WideHead(48, 1, 2)), "linear", PICTURES),
    "sit": (Dit(width=32, depth=2, heads=2, embeddings="dit", rope=True, norm="rms", mlp="swiglu"), "linear", PICTURES),
    "edm2": (Edm2(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head=8), "linear", PICTURES),
    "edm": (Edm(preset="cifar10", width=16, blocks=1), "ve", PICTURES),
    "ncsnpp": (Edm(preset="cifar10-ncsnpp", width=16, blocks=1), "linear", PICTURES),
    "adm": (Edm(preset="imagenet64", width=64, blocks=1), "linear", PICTURES),
    "mlp": (Mlp(width=16, depth=2), "linear", POINTS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_the_constructors_bit_for_bit(name):
    model, path, shape = NETWORKS[name]
    build = lambda: models.build(model, path, 0.5, shape, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        whole = build()
    before = torch.get_rng_state()
    late = deferred(build, 7)
    assert all(p.is_meta for p in late.net.parameters())
    want, got = whole.state_dict(), dict(late.numbers())
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)
    computed = dict(late.net.named_buffers())
    for k, x in whole.named_buffers():
        assert k in want or torch.equal(computed[k], x), f"{k} is computed, not drawn"
    assert torch.equal(before, torch.get_rng_state())


def test_few_parameters_have_memory_at_once():
    late = deferred(lambda: models.build(*NETWORKS["dit"][:2], 0.5, PICTURES, 3), 0)
    alive, most = [], 0
    for _, value in late.numbers():
        alive = [r for r in alive if r() is not None] + [weakref.ref(value)]
        del value
        most = max(most, len(alive))
    assert len(late.named) > 20 and most <= 3


def test_a_parameter_that_is_a_part_of_what_was_drawn_is_drawn():
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second = torch.randn(4, 3).chunk(2)
            self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)
            self.turned = torch.nn.Parameter(torch.rand(2, 5).t())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = Parts().state_dict()
    got = dict(deferred(Parts, 3).numbers())
    assert sorted(got) == sorted(want) and all(torch.equal(got[k], want[k]) for k in want)


def test_a_parameter_that_no_call_gives_is_refused():
    """Silently it would begin at zero."""

    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(made)

    made = torch.ones(3, device="meta")
    with pytest.raises(AssertionError, match="w: a tensor that no call"):
        deferred(Given, 0)
