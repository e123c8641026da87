"""Folders of images as people have them: what is taken, what is left out and named, what is asked about; and pixel stores."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.data import datasets
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.folders import SUFFIXES, listing
from cmt_fast.data.latents import Store
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from tests.data.test_encoding import RECIPE

PILLOWS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".tif": "TIFF",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
}


def picture(path: Path, seed: int = 0, side: int = 12) -> Path:
    """A file of noise in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    suffix = path.suffix.lower()
    made = Image.fromarray(noise).convert({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB"))
    made.save(path, PILLOWS.get(suffix, suffix[1:].upper()))
    return path


def encode(source: Path, out: Path, *more: str) -> int:
    return main(["data", "encode", str(source), str(out), "--size", "8", "--pixels", "--device", "cpu", *more])


def names(source: Path, **more) -> list[str]:
    return [p.name for p in listing(source, **more).pictures]


def test_every_kind_of_image_is_taken_whatever_the_case_of_its_suffix(tmp_path):
    """huggingface/pytorch-image-models#1335 (.tif) and pytorch/vision#707 (.bmp in one flat folder): found 0 images."""
    want = []
    for k, suffix in enumerate(SUFFIXES):
        for name in (f"a{k}{suffix}", f"b{k}{suffix.upper()}", f"c{k}{suffix.title()}"):
            want.append(picture(tmp_path / "images" / name, k).name)
    assert {".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm", ".jpg", ".jpeg", ".png", ".webp"} <= set(SUFFIXES)
    assert names(tmp_path / "images") == sorted(want)
    assert encode(tmp_path / "images", tmp_path / "out") == 0
    assert Store(tmp_path / "out").n == len(want)


def test_a_folder_trains_without_an_autoencoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(12):
        picture(Path("images") / "abc"[k % 3] / f"{k}.png", k)
    assert encode(Path("images"), Path("store")) == 0
    assert "12 rows of pixels uint8 3 x 8 x 8, 3 classes" in capsys.readouterr().out
    made = Store(Path("store"), flip=True)
    assert made.index.class_names == ("a", "b", "c") and made.index.vae == "" and made.n == 24
    row = 4 + 2  # a has 0 3 6 9, b 1 10 4 7; 15 x 12 becomes 10 x 8, of which the middle 8 columns start at 1
    scaled = Image.open("images/b/4.png").resize((10, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    stored = made.read(torch.tensor([row]))[0].numpy()
    assert stored.shape == (3, 8, 8) and (stored == np.asarray(scaled).transpose(2, 0, 1)).all()
    x, labels = made.rows(torch.tensor([row, row + 12]))
    torch.testing.assert_close(x[0], torch.from_numpy(stored).float() / 127.5 - 1)
    assert torch.equal(x[1], x[0].flip(-1)) and labels.tolist() == [1, 1]
    recipe = {**RECIPE, "data": {"kind": "latents", "path": "store", "flip": True}, "device": "cpu"}
    recipe["pre"] = {**recipe["pre"], "images_nimg": 32}
    Path("r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", "r.yaml", "--stages", "pre", "--out", "run"]) == 0
    assert checkpoint.complete(Path("run/pre")).manifest["step"] == 2


def test_encoding_pixels_goes_on_and_ranks_write_the_same_bytes(tmp_path, monkeypatch):
    from cmt_fast.runtime import distributed

    for k in range(7):
        picture(tmp_path / "images" / f"{k}.png", k)
    (tmp_path / "images" / "3.png").write_bytes(b"<html>")
    more = ["--shard-rows", "2", "--broken", "skip"]
    assert encode(tmp_path / "images", tmp_path / "one", *more) == 0
    contents = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    want = contents(tmp_path / "one")
    assert want["broken.tsv"].startswith(b"3.png\t") and Store(tmp_path / "one").n == 6
    (tmp_path / "two.part").mkdir()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "largest", lambda n: n)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert encode(tmp_path / "images", tmp_path / "two", *more) == 0
    assert contents(tmp_path / "two") == want


def test_grey_stores_have_one_channel(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "g.png")
    colour = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "g.png").rename(tmp_path / "images" / "g.png")
    Image.fromarray(colour).save(tmp_path / "images" / "r.png")
    assert encode(tmp_path / "images", tmp_path / "out", "--channels", "1") == 0
    rows = Store(tmp_path / "out").read(torch.arange(2)).numpy()
    assert rows.shape == (2, 1, 8, 8) and (rows[0, 0] == np.arange(64).reshape(8, 8)).all()
    assert (rows[1] == 76).all()  # Rec. 601: 0.299 * 255 = 76.2


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["--vae", "--pixels", "neither"]),
        (["--pixels", "--vae", "v"], ["--vae", "--pixels", "both"]),
        (["--pixels", "--flip"], ["--flip", "data.flip"]),
        (["--pixels", "--dtype", "fp32"], ["--dtype", "latents"]),
        (["--pixels", "--statistics", "mean"], ["--statistics", "latents"]),
        (["--vae", "v", "--channels", "1"], ["--channels", "--pixels"]),
        (["--pixels", "--channels", "2"], ["--channels", "2"]),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, words):
    picture(tmp_path / "images" / "a.png")
    assert main(["data", "encode", str(tmp_path / "images"), str(tmp_path / "out"), "--size", "8", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_what_is_skipped_is_counted_and_named(tmp_path, capsys):
    """shiveshc/NIDDL#5: a hidden .DS_Store beside the images stopped the run."""
    images = tmp_path / "images"
    picture(images / "cat" / "a.png", 1)
    picture(images / "dog" / "deep" / "b.jpg", 2)
    for name in ("notes.txt", "cat/Thumbs.db", "cat/.DS_Store", "cat/._a.png", "dog/c.heic"):
        (images / name).write_bytes(b"x")
    assert encode(images, tmp_path / "out") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{images}: skipped 5 files that are not read as images: notes.txt, cat/.DS_Store, cat/._a.png, ..."
    assert Store(tmp_path / "out").labels.tolist() == [0, 1]


def test_what_systems_leave_behind_is_no_class(tmp_path, capsys):
    """pytorch/vision#2831, open-mmlab/mmpretrain#507: .ipynb_checkpoints became class 0."""
    images = tmp_path / "images"
    for k, name in enumerate(("cat", "dog")):
        picture(images / name / "a.png", k)
    for name in (
        "__MACOSX/cat",
        ".thumbnails",
        "@eaDir",
        ".ipynb_checkpoints",
        "lost+found",
        "cat/.thumbnails",
        "cat/@eaDir",
    ):
        picture(images / name / "a.png")
    found = listing(images)
    assert found.classes == ["cat", "dog"] and [p.name for p in found.pictures] == ["cat/a.png", "dog/a.png"]
    assert found.told() == "skipped 7 folders: .ipynb_checkpoints, .thumbnails, @eaDir, ..."
    flat = tmp_path / "flat"
    picture(flat / "a.png")
    picture(flat / "@eaDir" / "a.png" / "SYNOPHOTO_THUMB_M.jpg")
    assert encode(flat, tmp_path / "out") == 0 and Store(tmp_path / "out").classes == 0
    assert "skipped 1 folder: @eaDir" in capsys.readouterr().out


def test_links_to_files_and_folders_are_followed(tmp_path):
    """fastai/fastai#2270: a folder that was a link was not used."""
    picture(tmp_path / "far" / "cats" / "in" / "1.png", 1)
    picture(tmp_path / "far" / "2.png", 2)
    images = tmp_path / "images"
    (images / "dog").mkdir(parents=True)
    (images / "cat").symlink_to(tmp_path / "far" / "cats")
    (images / "dog" / "two.png").symlink_to("../../far/2.png")
    found = listing(images)
    assert found.classes == ["cat", "dog"] and [(p.name, p.label) for p in found.pictures] == [
        ("cat/in/1.png", 0),
        ("dog/two.png", 1),
    ]
    assert encode(images, tmp_path / "out") == 0
    plain = tmp_path / "plain"
    shutil.copytree(images, plain)  # what the links lead to, as files
    assert encode(plain, tmp_path / "same") == 0
    assert (tmp_path / "out" / "shard-00000.bin").read_bytes() == (tmp_path / "same" / "shard-00000.bin").read_bytes()


@pytest.mark.parametrize(
    "place, target", [("cat/loop", ".."), ("cat/loop", "."), ("up", "../.."), ("cat/deep/a", "../../cat")]
)
def test_a_circle_of_links_ends_in_one_line(tmp_path, capsys, place, target):
    images = tmp_path / "images"
    picture(images / "cat" / "a.png")
    picture(images / "cat" / "deep" / "b.png")
    (images / place).symlink_to(target)
    assert encode(images, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(
        f"cmt: {images / place}: is a link to a folder that it lies in itself, a circle"
    )
    assert not (tmp_path / "out.part").exists()


def test_links_that_lead_nowhere_are_as_broken_images(tmp_path, capsys):
    images = tmp_path / "images"
    for k in range(3):
        picture(images / "cat" / f"{k}.png", k)
    (images / "cat" / "gone.png").symlink_to("nowhere.png")
    (images / "cat" / "itself.png").symlink_to("itself.png")
    assert encode(images, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "gone.png: is a link that leads nowhere" in err and "--broken skip" in err
    assert encode(images, tmp_path / "out", "--broken", "skip") == 0
    lines = (tmp_path / "out" / "broken.tsv").read_text().splitlines()
    assert lines == [f"cat/{n}.png\tis a link that leads nowhere" for n in ("gone", "itself")]
    assert Store(tmp_path / "out").n == 3
    (images / "dog").symlink_to(tmp_path / "unmounted")  # a class folder that is not there
    capsys.readouterr()
    assert encode(images, tmp_path / "more") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "links that lead nowhere: dog" in err
    assert encode(images, tmp_path / "more", "--broken", "skip") == 0
    assert "skipped 1 link that leads nowhere: dog" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folders, named",
    [
        (["train", "val"], "images/train"),
        (["Training", "Validation", "Test"], "images/Training"),
        (["test", "train2017", "val2017"], "images/train2017"),
        (["ILSVRC2012_img_train", "ILSVRC2012_img_val"], "images/ILSVRC2012_img_train"),
        (["valid_images", "test_images"], "images/test_images"),
        (["train"], "images/train"),
    ],
)
def test_splits_are_asked_about(tmp_path, monkeypatch, capsys, folders, named):
    """huggingface/datasets#4015: of ImageNet with train/ and val/ "the parsing of classes is incorrect"."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(folders):
        picture(Path("images") / name / "n01440764" / "a.png", k)
        picture(Path("images") / name / "n01443537" / "a.png", k)
    assert encode(Path("images"), Path("out")) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "look like splits" in err
        and f"cmt data encode {named} ..." in err
        and "--any-class" in err
    )
    assert encode(Path("images"), Path("out"), "--any-class") == 0
    assert Store(Path("out")).class_names == tuple(sorted(folders))
    assert encode(Path(named), Path("one")) == 0 and Store(Path("one")).class_names == ("n01440764", "n01443537")


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    for k, name in enumerate(("bus", "train", "tram")):
        picture(tmp_path / name / "a.png", k)
    assert listing(tmp_path).classes == ["bus", "train", "tram"]


def test_one_level_too_many_is_asked_about(tmp_path):
    for k in range(3):
        picture(tmp_path / "imagenet" / f"n0144{k}" / "a.png", k)
    with pytest.raises(DatasetError) as caught:
        listing(tmp_path)
    text = str(caught.value)
    assert (
        "holds one folder, imagenet" in text
        and "3 folders" in text
        and f"cmt data encode {tmp_path / 'imagenet'} ..." in text
    )
    assert listing(tmp_path, any_class=True).classes == ["imagenet"]
    assert listing(tmp_path / "imagenet").classes == ["n01440", "n01441", "n01442"]
    picture(tmp_path / "imagenet" / "own.png")  # images of its own: one class after all
    assert listing(tmp_path).classes == ["imagenet"]


def test_class_folders_without_an_image_are_named(tmp_path):
    """pytorch/vision#4925: whether an empty folder is a class."""
    for k, name in enumerate(("cat", "dog", "eel", "fox")):
        (tmp_path / name).mkdir()
        if name in ("cat", "fox"):
            picture(tmp_path / name / "a.png", k)
    (tmp_path / "eel" / "a.heic").write_bytes(b"x")
    with pytest.raises(DatasetError) as caught:
        listing(tmp_path)
    text = str(caught.value)
    assert "2 of 4 class folders hold no image: dog, eel (other files: eel/a.heic)" in text and "--any-class" in text
    kept = listing(tmp_path, any_class=True)
    assert kept.classes == ["cat", "dog", "eel", "fox"] and [p.label for p in kept.pictures] == [0, 3]


def test_what_no_folder_of_images_is(tmp_path):
    def refused(*words: str) -> None:
        with pytest.raises(DatasetError) as caught:
            listing(tmp_path)
        assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words), str(caught.value)

    refused("holds no image", ".tif")
    (tmp_path / "photos.zip").write_bytes(b"x")
    refused("holds no image", "1 other files (photos.zip)")
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "b.png")
    refused("in folders (cat) and beside them (b.png)")


def test_folders_of_a_dataset_tool_are_no_classes(tmp_path, capsys):
    """NVlabs/stylegan2-ada-pytorch#18: "Folders do not signify labels in our dataset format", dataset.json does."""
    for k in range(4):
        picture(tmp_path / "images" / f"0000{k // 2}" / f"img{k}.png", k, side=8)
    body = {"labels": [[f"0000{k // 2}/img{k}.png", 1 - k % 2] for k in range(4)]}
    (tmp_path / "images" / "dataset.json").write_text(json.dumps(body))
    assert encode(tmp_path / "images", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "dataset.json" in err and "--format edm" in err
    assert main(["data", "import", str(tmp_path / "images"), str(tmp_path / "out"), "--format", "edm"]) == 0
    assert Store(tmp_path / "out").labels.tolist() == [1, 0, 1, 0]
    (tmp_path / "images" / "dataset.json").write_text('{"labels": null}')  # it says nothing of classes
    assert listing(tmp_path / "images").classes == ["00000", "00001"]


def test_one_image_two_images_one_class(tmp_path, recwarn, monkeypatch, capsys):
    load = lambda store: datasets.load(loading.load("digits", [f"data={{kind: latents, path: {store}}}"]).data)
    picture(tmp_path / "one" / "a.png")
    assert encode(tmp_path / "one", tmp_path / "1") == 0 and load(tmp_path / "1").n == 1
    assert "one row is no data set to be judged by" in capsys.readouterr().out
    recipe = {**RECIPE, "data": {"kind": "latents", "path": "1"}, "device": "cpu"}
    recipe["pre"] = {**recipe["pre"], "images_nimg": 32}
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["train", "one.yaml", "--stages", "pre"]) == 2 and not Path("runs").exists()
    assert "has 1 row" in (err := capsys.readouterr().err) and "two copies of it" in err and err.count("\n") == 1
    loop.train(Workspace(loading.build(recipe), Path("run")), ["pre"])  # without a judge one row is trained on as any
    assert checkpoint.complete(Path("run/pre")).manifest["step"] == 2
    picture(tmp_path / "one" / "b.png", 1)
    assert encode(tmp_path / "one", tmp_path / "2") == 0 and "one row" not in capsys.readouterr().out
    assert Store(tmp_path / "2").n == 2 and load(tmp_path / "2").classes == 0
    os.rename(tmp_path / "one", tmp_path / "cat")
    (tmp_path / "class").mkdir()
    os.rename(tmp_path / "cat", tmp_path / "class" / "cat")
    assert encode(tmp_path / "class", tmp_path / "3") == 0
    assert load(tmp_path / "3").classes == 1 and load(tmp_path / "3").labels.tolist() == [0, 0]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_an_image_of_one_colour_is_nothing_to_learn(tmp_path, capsys, recwarn):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9), (10, 20, 30)).save(tmp_path / "images" / "a.png")
    assert encode(tmp_path / "images", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "channel 0 is the same number everywhere, 10 in 1 row; there is nothing in it to learn" in err
    assert err.count("\n") == 1 and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    red = np.zeros((9, 9, 3), np.uint8)
    red[..., 0] = np.arange(81).reshape(9, 9)
    Image.fromarray(red).save(tmp_path / "images" / "a.png")
    assert encode(tmp_path / "images", tmp_path / "red") == 2
    assert (
        "channel 1 is the same number everywhere, 0 in 1 row" in (err := capsys.readouterr().err)
        and "--channels 1" in err
    )
    assert encode(tmp_path / "images", tmp_path / "grey", "--channels", "1") == 0
