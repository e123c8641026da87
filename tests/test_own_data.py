"""The way of somebody who brings photographs: a folder becomes a store, a picture, a recipe, a run, samples of their classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_fast.cli import main
from cmt_fast.data.opening import opened

CLASSES = ("building", "flower", "negative", "sepia")
SHRUNK = ["pre.batch=16", "mid.batch=16", "post.batch=16", "control.batch=16", "pre.warmup_nimg=0", "mid.warmup_nimg=0",
          "model.width=32", "model.depth=1", "model.heads=2", "mid.trajectories.pool_steps=2", "post.trajectories.pool_steps=2",
          "mid.trajectories.nfe=4", "post.trajectories.nfe=4", "eval.n=32", "eval.n_during=32"]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Class folders that are links, each of ten patches of scikit-learn's photographs; a .TIF, a grey, a broken file, a text."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    real, folder = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("photos")
    dice = np.random.default_rng(0)
    building, flower = (np.asarray(i) for i in images)
    sepia = (building.mean(-1, keepdims=True) * np.array([0.9, 0.7, 0.4])).astype(np.uint8)
    for name, photo in zip(CLASSES, (building, flower, 255 - flower, sepia)):
        (real / f"{name}-v2").mkdir()
        for i in range(10):
            y, x = (int(dice.integers(0, side - 120)) for side in photo.shape[:2])
            patch = Image.fromarray(np.ascontiguousarray(photo[y : y + 120, x : x + 96]))
            ending = "TIF" if (name, i) == ("flower", 3) else "JPG"
            (patch.convert("L") if (name, i) == ("sepia", 4) else patch).save(real / f"{name}-v2" / f"{i}.{ending}")
        (folder / name).symlink_to(real / f"{name}-v2")
    (real / "building-v2" / "9.JPG").write_bytes(b"\xff\xd8\xff no more")
    (real / "building-v2" / "notes.txt").write_text("of the roof")
    return folder


def test_from_a_folder_of_photographs_to_samples_of_their_classes(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encode = ["data", "encode", str(photos), "store", "--size", "16", "--pixels"]
    assert main(encode) == 2
    assert "9.JPG" in (said := capsys.readouterr().err) and "--broken skip" in said
    assert main([*encode, "--broken", "skip"]) == 0
    said = capsys.readouterr().out
    assert "39 rows of pixels uint8 3 x 16 x 16, 4 classes" in said and "skipped 1 file" in said and "notes.txt" in said
    store = opened(Path("store"))
    assert store.class_names == CLASSES and store.labels.bincount().tolist() == [9, 10, 10, 10]
    assert main(["data", "look", "store"]) == 0 and Path("store-look.png").is_file()
    assert main(["recipes", "new", "mine", "--data", "store", "--like", "digits", "--images", "96"]) == 0
    assert main(["train", "mine.yaml", *SHRUNK]) == 0
    said = capsys.readouterr().out
    assert "classes: 4 (building, flower, negative, sepia), 9 to 10 rows each" in said
    assert main(["sample", "runs/mine/post", "--n", "78", "--out", "all.npz"]) == 0
    made = np.load("all.npz")
    assert made["images"].shape == (78, 3, 16, 16) and np.isfinite(made["images"]).all()
    assert np.bincount(made["labels"]).tolist() == [18, 20, 20, 20]  # twice the rows, in the data's own proportions
    assert main(["sample", "runs/mine/post", "--class", "sepia,flower", "--n", "6", "--out", "two.npz"]) == 0
    assert sorted(np.load("two.npz")["labels"].tolist()) == [1, 1, 1, 3, 3, 3]
    last = [json.loads(line) for line in Path("runs/mine/post/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(
        "data" in row.get("labels", "") for row in last
    )  # the law of its evaluations stands beside their figures
