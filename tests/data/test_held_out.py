"""Rows kept from training: whole images, a function of the seed, and what is left is the same rows in the same draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmt_fast.config.schema import Digits
from cmt_fast.data import digits, held_out
from cmt_fast.data.opening import opened
from cmt_fast.data.order import Loader, Order
from cmt_fast.data.shards import export
from cmt_fast.diffusion.rng import Random
from tests.fixtures.stores import make_store

CPU = torch.device("cpu")


def test_images_in_memory_are_on_one_side_or_the_other() -> None:
    data = digits.load(Digits())
    rest, held = held_out.split(data, 0.2, 5)
    assert len(held) == round(0.2 * data.n) == data.n - rest.n and held.unique().numel() == len(held)
    kept = torch.ones(data.n, dtype=torch.bool)
    kept[held] = False
    assert torch.equal(rest.x, data.x[kept]) and torch.equal(rest.labels, data.labels[kept])
    assert torch.equal(held_out.split(data, 0.2, 5)[1], held) and not torch.equal(held_out.split(data, 0.2, 6)[1], held)
    assert held_out.split(data, 0.0, 5)[0] is data and not len(held_out.split(data, 0.0, 5)[1])
    with pytest.raises(ValueError, match="0.0001 of 1,797 images are 0"):
        held_out.split(data, 1e-4, 5)


@pytest.mark.parametrize("shards", [False, True])
def test_a_mirror_image_is_on_the_side_of_its_image(shards: bool, tmp_path: Path) -> None:
    """A store whose mirror images are rows of their own; in archives, an epoch keeps their order."""
    make_store(tmp_path / "store", 40, (4, 8, 8), classes=3, flips=True)
    store = opened(tmp_path / "store", flip=True)
    if shards:
        export(store, tmp_path / "shards", 8, 0, lambda *_: None)
        store = opened(tmp_path / "shards", flip=True)
    rest, held = held_out.split(store, 0.25, 3)
    half = store.n // 2
    assert sorted((held % half).tolist()) == sorted([*(held[held < half]).tolist()] * 2) and len(held) == store.n // 4
    assert rest.n == store.n - len(held) and not set(rest.kept.tolist()) & set(held.tolist())
    place = torch.arange(rest.n)
    index, epoch = Order(rest, 7)(place)
    assert sorted(index.tolist()) == place.tolist() and not torch.equal(index, place)
    if shards:
        whole = store.order(Random(7, 0, 0))
        assert torch.equal(rest.kept[index], whole[torch.isin(whole, rest.kept)])
    loader = Loader(rest, 7, CPU, 4)
    x, labels = loader.rows(place[:4])
    loader.close()
    want, named = store.rows(rest.kept[index[:4]], epoch[:4], 7)
    assert torch.equal(x, want) and torch.equal(labels, named) and torch.equal(rest.labels[index[:4]], named)
    assert torch.equal(rest.rows(index[:4], epoch[:4], 7)[0], want)
