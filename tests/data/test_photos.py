"""Windows of the photographs that come inside scikit-learn and scikit-image."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cmt_fast.cli import main
from cmt_fast.config.schema import Photos
from cmt_fast.data import photos

ROWS = len(photos.SHARES) * photos.PLACES**2  # of a photograph


@pytest.fixture
def fresh():
    """Photographs are read again, as in another process."""
    photos._rows.cache_clear()
    yield
    photos._rows.cache_clear()


def test_rows_are_colour_images_of_six_named_classes_in_the_range_of_networks():
    data = photos.load(Photos())
    assert data.shape == (3, 32, 32) and data.n == 6 * ROWS == 3600 and data.x.dtype == torch.float32
    assert -1 <= float(data.x.min()) < -0.99 and 0.99 < float(data.x.max()) <= 1
    assert data.class_names == ("pagoda", "dahlia", "astronaut", "cat", "coffee", "rocket") and data.classes == 6
    assert torch.bincount(data.labels).tolist() == [ROWS] * 6
    assert float((data.x[:, 0] - data.x[:, 2]).abs().mean()) > 0.1, "it is a grey set"
    assert data.facts == {"rows": 3600, "xxh3_128": data.checksum}
    assert len(data.x.flatten(1).unique(dim=0)) == data.n, "a window stands twice"
    light, dark = (float(data.x[data.labels == k].mean()) for k in (0, 5))  # a pagoda by day, a rocket by night
    assert dark < -0.4 < light


def test_windows_reach_from_edge_to_edge_of_a_photograph(tmp_path):
    """Of a picture whose colour is its place, a window's colour says where it was cut."""
    h, w = 60, 90
    place = np.stack(np.broadcast_arrays(np.arange(h)[:, None] * 4, np.arange(w)[None] * 2, 0), -1).astype(np.uint8)
    Image.fromarray(place).save(tmp_path / "place.png")
    cut = np.stack(photos._windows((tmp_path / "place.png").read_bytes())).astype(float)
    for k, share in enumerate(photos.SHARES):
        rows, side = cut[k * photos.PLACES**2 : (k + 1) * photos.PLACES**2], share * h
        middle = rows[:, :2].mean((2, 3)) / [4, 2] + 0.5  # of each window in pixels from the top and from the left
        across = np.linspace(side / 2, w - side / 2, photos.PLACES)
        down = np.linspace(side / 2, h - side / 2, photos.PLACES)
        assert np.abs(middle - [(y, x) for y in down for x in across]).max() < 0.5


@pytest.mark.parametrize("package, pip", photos.PIP.items())
def test_a_package_that_is_not_installed_is_named(package, pip, fresh, monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else spec(name, *rest))
    with pytest.raises(ValueError, match=f"data.kind: 'photos' reads {pip}, which is not installed: pip install {pip}"):
        photos.load(Photos())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"file": "data/chelsea.tif"}, "which this version of scikit-image does not have"),
        ({"hash": "0" * 16}, "which is not the photograph that the rows are cut from"),
    ],
)
def test_another_version_of_a_photograph_is_an_error(change, words, fresh, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(photos, "PHOTOS", (*photos.PHOTOS[:3], photos.PHOTOS[3]._replace(**change), *photos.PHOTOS[4:]))
    assert main(["train", "photos", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("cmt: data.kind: 'photos' reads ") and words in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_no_package_is_imported_for_its_photographs(fresh, monkeypatch):
    for name in photos.PIP:
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    monkeypatch.setattr(importlib.util, "find_spec", found := importlib.machinery.PathFinder.find_spec)
    assert found is importlib.util.find_spec and photos.load(Photos()).n == 3600
