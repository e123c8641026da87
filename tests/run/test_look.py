"""The picture of what training is about to see: its rows are the loader's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cmt_fast import cli
from cmt_fast.config import loading
from cmt_fast.config.schema import Latents, Torch
from cmt_fast.data import datasets
from cmt_fast.data.loaders import loader
from cmt_fast.data.opening import opened
from cmt_fast.data.rows import Dataset
from cmt_fast.render import look as picture
from cmt_fast.run import look
from cmt_fast.run.decoding import Decoding
from tests.fixtures import small
from tests.fixtures.stores import make_store

CPU = torch.device("cpu")


def rows_of_training(data, seed: int, n: int):
    """The first n rows as a stage of batch n gets them."""
    feed = loader(Torch(), data, seed, CPU, n)
    try:
        return feed.rows(torch.arange(n))
    finally:
        feed.close()


@pytest.mark.parametrize("how", [{}, {"flip": True}, {"mean": (1.0,) * 4, "std": (2.0,) * 4, "scale": 0.3}])
def test_the_samples_shown_are_the_first_rows_of_training(tmp_path, how):
    make_store(tmp_path / "store", flips=True)
    data = datasets.load(Latents(str(tmp_path / "store"), **how))
    x, labels = rows_of_training(data, 5, 16)
    seen, y = look.first_rows(data, 5, 16)
    assert torch.equal(seen, x) and torch.equal(y, labels)
    assert not torch.equal(look.first_rows(data, 6, 16)[0], x)
    found = look.gather(data, Decoding(data, CPU), 5, "store")
    assert torch.equal(found.values[:, : 16 * 16], x.transpose(0, 1).flatten(1)[:, : 16 * 16])
    assert found.names == [data.class_names[k] for k in labels.tolist()]
    assert sum(rows for _, rows in found.counts) == data.n
    assert any("3 of 4 channels are shown" in line and "autoencoder" in line for line in found.lines)


def test_what_a_picture_says_of_pixels_points_and_classes_without_rows(tmp_path):
    make_store(tmp_path / "store", n=40, shape=(3, 8, 8), pixels=True)
    data = opened(tmp_path / "store")
    found = look.gather(data, Decoding(data, CPU), 0, "store")
    assert found.samples.shape == (16, 3, 8, 8) and found.samples.abs().max() <= 1
    assert found.samples.mul(127.5).add(127.5).round().sub(found.samples * 127.5 + 127.5).abs().max() < 1e-4  # bytes
    gapped = Dataset(torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 2]), 4)
    found = look.gather(gapped, Decoding(gapped, CPU), 0, "gapped")
    assert len(found.samples) == 3 and found.counts == [("0", 1), ("2", 2)]
    assert any("without rows: 1, 3" in line for line in found.lines)
    points = Dataset(torch.rand(5, 7), None, 0)
    found = look.gather(points, Decoding(points, CPU), 0, "points")
    assert found.samples.shape == (5, 2) and found.names == [""] * 5 and not found.counts
    assert "2 of 7 numbers of a row are shown" in found.lines


def test_the_picture_holds_the_samples(tmp_path):
    """Two flat samples, black and white: their tiles in the file are that."""
    flat = torch.stack((torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)))
    seen = picture.Look(
        "two", flat, ["a $5", "b" * 60], flat.transpose(0, 1).flatten(1), [("a $5", 1), ("b" * 60, 1)], ["x"]
    )
    picture.draw(seen, tmp_path / "deep" / "two.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "two.png").convert("L"))
    first, second = (pixels[: pixels.shape[0] // 2, slice(*span)] for span in ((20, 120), (170, 270)))
    assert (first == 0).mean() > 0.2 and (second == 0).mean() < 0.1
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["two.png"]


def test_the_command_takes_stores_files_and_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store", n=20)
    np.savez(tmp_path / "own.npz", images=np.zeros((2, 1, 4, 4), np.uint8), labels=np.array([0, 1]))
    for given, file in (("store", "store-look.png"), ("own.npz", "own-look.png"), ("digits", "digits-look.png")):
        assert cli.main(["data", "look", given]) == 0
        said = capsys.readouterr().out
        assert f"{file}: a picture" in said and (tmp_path / file).is_file()
        assert ("training refuses these: data.unchecked: images of 'own.npz'" in said) == (
            given == "own.npz"
        )  # all black
    for arguments, words in (
        (["nowhere"], ["STORE", "'nowhere'", "no store, no .npz file and no recipe"]),
        (["store", "--out", "x.jpg"], ["--out", "'x.jpg'", ".png"]),
        (["store", "--vae", "nowhere"], ["vae", "'nowhere'"]),
        (["store", "--n", "0"], ["--n", "at least 1"]),
    ):
        assert cli.main(["data", "look", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(word in said for word in words), said


def test_a_dry_run_writes_the_picture_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", "--dry-run", "--out", "mine"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine-look.png"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("mine-look.png: a picture of the first samples")
    monkeypatch.setattr(picture, "draw", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert cli.main(["train", "digits", "--dry-run", "--out", "mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no picture of the data: read-only: mine-look.png"


@pytest.mark.parametrize("channels, shown", [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (16, 3)])
def test_of_arrays_of_any_channels_what_can_be_shown_is(tmp_path, monkeypatch, capsys, channels, shown):
    """Latents of other autoencoders in an .npz file: a stage ends with a picture of them, whatever they are."""
    monkeypatch.chdir(tmp_path)
    recipe = small.recipe(tmp_path, {"kind": "dit", "width": 16, "depth": 1, "heads": 2})
    x = np.random.default_rng(0).normal(size=(8, channels, small.SIDE, small.SIDE)).astype(np.float32)
    np.savez("data.npz", images=x / 2, labels=np.arange(8) % 2)
    data = datasets.load(loading.load(str(recipe)).data)
    seen, note = Decoding(data, CPU).visible(data.x)
    assert torch.equal(seen, data.x[:, :shown]) and note == ("" if shown == channels else f"{shown} of {channels}")
    assert (f"{note} channels are shown" in look.gather(data, Decoding(data, CPU), 0, "x").lines) == bool(note)
    if channels not in (2, 5):
        return
    assert cli.main(["train", str(recipe), "--stages", "pre", "--out", "run"]) == 0
    assert cli.main(["sample", "run/pre", "--n", "4", "--grid", "x.png"]) == 0
    assert "x.png: a picture of 4 of run/pre" in (said := capsys.readouterr().out) and f"({note} channels)" in said
    assert list((tmp_path / "run" / "pre" / "grids").glob("*.png"))
