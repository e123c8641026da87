"""`cmt recipes new`: the recipe that it writes is valid for the store, and two steps of each of its stages run; and what a
recipe needs from outside, told at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.run import needs
from cmt_fast.storage import checkpoint
from tests.fixtures.stores import make_store
from tests.recipes.test_recipes import shrunk

# shape, classes, pixels
STORES = {
    "pixels32": ((3, 32, 32), 3, True),
    "pixels64": ((3, 64, 64), 0, True),
    "latents32": ((4, 32, 32), 3, False),
}
# the network that fits: kind, and its preset or patch
MODELS = {
    ("pixels32", "digits"): ("dit", 2), ("pixels64", "digits"): ("dit", 4), ("latents32", "digits"): ("dit", 2),
    ("pixels32", "cifar10"): ("edm", "cifar10"), ("pixels64", "cifar10"): ("edm", "ffhq64"), ("latents32", "cifar10"): ("dit", 2),
    ("pixels32", "imagenet256-mf"): ("dit", 2), ("pixels64", "imagenet256-mf"): ("dit", 4),
    ("latents32", "imagenet256-mf"): ("dit", 2),
    ("pixels32", "imagenet512-dit"): ("dit", 2), ("pixels64", "imagenet512-dit"): ("dit", 4),
    ("latents32", "imagenet512-dit"): ("dit", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, (shape, classes, pixels) in STORES.items():
        make_store(folder / name, 24, shape, classes=classes, pixels=pixels)
    return folder


@pytest.mark.parametrize("store, like", MODELS)
def test_a_new_recipe_fits_its_store_and_trains(store, like, stores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (shape, classes, _), (kind, of) = STORES[store], MODELS[store, like]
    assert main(["recipes", "new", "mine", "--data", str(stores / store), "--like", like, "--images", "20000"]) == 0
    assert "cmt train mine.yaml" in capsys.readouterr().out
    run = loading.load("mine.yaml")
    assert run.name == "mine" and run.data.expects.shape == shape and run.data.expects.classes == classes
    assert run.model.kind == kind and of == (run.model.preset if kind == "edm" else run.model.patch)
    assert kind != "edm" or run.model.conditional == bool(classes)
    assert abs(run.mid.images_nimg + run.post.images_nimg - 20_000) <= run.mid.batch + run.post.batch
    assert run.eval.metric == "frechet" and run.eval.reference is None and run.engine == "local"
    assert not [n for n in needs.needs(run, tmp_path, stages=list(run.stages)) if not n.here]
    header = [line for line in Path("mine.yaml").read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert like in header[0] and any("eval" in line for line in header) == (like != "digits")
    small = [o for o in shrunk(run) if not o.startswith("model.heads")] + ["model.heads=2"] * (kind == "dit")
    overrides = [*small, "eval.steps=1", "device=cpu"]
    assert main(["train", "mine.yaml", *overrides, "--out", "run"]) == 0
    assert all(checkpoint.complete(Path("run") / stage).manifest["step"] == 2 for stage in run.stages)


@pytest.mark.parametrize("like", ["imagenet512-dit", "imagenet256-mf", "imagenet256-mf-teacher"])
def test_what_nothing_guides_is_left_out_of_a_new_recipe(like, tmp_path, monkeypatch, capsys):
    """One class folder: with its label and without are the same, which a run refuses to guide by."""
    monkeypatch.chdir(tmp_path)
    make_store(Path("one"), 12, (3, 16, 16), classes=1, pixels=True)
    assert main(["recipes", "new", "my own", "--data", "one", "--like", like]) == 0
    said = capsys.readouterr().out
    assert "label dropout and guidance are left out: the store has one class" in said
    assert "cmt train 'my own.yaml'" in said and "12 rows of 3 x 16 x 16, 1 class\n" in said
    assert main(["recipes", "validate", "my own.yaml"]) == 0, capsys.readouterr().err


def test_a_file_for_the_perceptual_distance_is_used_where_it_fits(stores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new = ["recipes", "new", "mine", "--like", "cifar10", "--perceptual", "my vgg.pt", "--data"]
    assert main([*new, str(stores / "pixels32")]) == 0
    run = loading.load("mine.yaml")
    assert run.mid.objective.distance == "lpips" and run.mid.perceptual.weights == "my vgg.pt"
    Path("mine.yaml").unlink()
    assert main([*new, str(stores / "latents32")]) == 2
    assert "--perceptual: 'cifar10' has no perceptual distance" in capsys.readouterr().err


def test_what_a_copy_needs_is_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "cifar10", "mine.yaml"]) == 0
    said = capsys.readouterr().out
    for words in (
        "data.path: 'data/cifar10' is not a folder; make it by `cmt data encode IMAGES data/cifar10 --size 32",
        "pre: 'runs/cifar10/pre' has no checkpoint; train it first, or `cmt ckpt import edm-cifar10-32x32-uncond-vp.pkl",
        "mid.perceptual.weights: 'data/weights/lpips-vgg.safetensors' does not exist; VGG16",
        "eval.weights: 'data/weights/weights-inception-2015-12-05-6726825d.pth' is no file; fetch it from https://",
        "eval.reference: 'data/stats/cifar10-32x32.npz' is no file; public statistics",
    ):
        assert words in said, said
    Path("data/cifar10").mkdir(parents=True)
    found = {n.key: n.here for n in needs.needs(loading.load("cifar10"), Path("runs/cifar10"))}
    assert found["data.path"] and not found["mid.perceptual.weights"]
    assert main(["train", "imagenet256-mf"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "things are missing: " in line and "`cmt train imagenet256-mf-teacher --stages pre" in line
    assert "eval.reference" in line and "data.path" in line and not Path("runs").exists()


def test_packages_of_the_data_are_told_at_once_with_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs, "installed", lambda module: False)
    assert main(["train", "photos", "loader.kind=dali"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    wanted = (
        "sklearn' is not installed; pip install 'cmt-fast[demo]'",
        "skimage'",
        "nvidia.dali'",
        "3 things are missing",
    )
    assert all(words in line for words in wanted), line


def test_a_bare_train_asks_which_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    out, err = capsys.readouterr()
    assert "cifar10                CIFAR-10, unconditional" in out and err.startswith("cmt: cmt train: which recipe?")
    assert not list(tmp_path.iterdir())
