"""Labels through the commands: another network's table, what is printed and recorded, runs that began before."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from cmt_kernels import use

from cmt_fast.cli import main
from cmt_fast.config import loading, recipes
from cmt_fast.evaluation import references
from cmt_fast.evaluation.distances import Moments
from cmt_fast.evaluation.references import Reference
from cmt_fast.models import layers
from cmt_fast.run import folder
from cmt_fast.run.workspace import Workspace, stored_run
from cmt_fast.storage import sound
from cmt_fast.train import loop
from tests.fixtures import small, stores
from tests.fixtures.tiny import metrics

DIT = {"kind": "dit", "width": 16, "depth": 1, "heads": 2}
OURS = "--out", "mine"


def images(path, labels) -> None:
    """One random image for each label."""
    random = np.random.default_rng(0).normal(size=(len(labels), 4, small.SIDE, small.SIDE)) * 0.5
    np.savez(path, images=random.astype(np.float32), labels=np.array(labels))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher of ten classes, `wide/pre`; data of two of them, 5 and 7, and of none."""
    where = tmp_path_factory.mktemp("labels")
    recipe = small.recipe(where, DIT)
    images(where / "data.npz", list(range(10)) * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert main(["train", str(recipe), "--stages", "pre", "--out", "wide"]) == 0
    tree = yaml.safe_load(recipe.read_text())
    tree["pre"] = None
    tree["mid"] |= {"start": None, "teacher": "wide/pre", "eval_every_nimg": 4, "grid_every_nimg": 8}
    images(where / "two.npz", [5, 7, 7, 7] * 4)
    tree["data"] = {"kind": "npz", "path": "two.npz"}
    (where / "two.yaml").write_text(yaml.safe_dump(tree))
    return where


@pytest.fixture
def seen(monkeypatch):
    """Labels that any network of more than one row was called with."""
    found: list[int] = []
    forward = layers.LabelEmbedder.forward

    def told(self, labels, drop=None):
        found.extend(labels.tolist() if len(labels) > 1 else [])
        return forward(self, labels, drop)

    monkeypatch.setattr(layers.LabelEmbedder, "forward", told)
    return found


def said(capsys, *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return err if code else out


def test_a_teacher_of_more_classes_asks_which_they_are_and_sees_those_alone(world, seen, monkeypatch, capsys):
    """facebookresearch/DiT#100, openai/improved-diffusion#50: two classes of one's own and a table of more."""
    monkeypatch.chdir(world)
    error = said(capsys, "train", "two.yaml", "--stages", "mid", *OURS, code=2)
    assert error.count("\n") == 1 and "its classes is 10, this run's is 2" in error
    keys = error.partition("the data's are: ")[2].partition(" (")[0].split()
    assert keys == ["data.class_ids=[5,7]", "data.classes=10"]
    assert not (world / "mine").exists()
    seen.clear()
    out = said(capsys, "train", "two.yaml", *keys, "--stages", "mid", *OURS)
    line = (
        "classes: 2 of the network's 10 (5, 7), 4 to 12 rows each; unbalanced 3:1; without rows: 0, 1, 2, 3, 4, 6, 8, 9"
    )
    assert line in out and set(seen) == {5, 7}  # rollouts, the student's batches, evaluation, pictures
    row = next(r for r in metrics(world / "mine" / "mid") if r["kind"] == "eval")
    assert row["labels"] == "data: 2 classes, 25 % to 75 %" and row["note"].startswith("4 samples and 16 rows")
    seen.clear()
    said(capsys, "sample", "mine/mid", "--n", "8", "--out", "x.npz")
    assert np.load("x.npz")["labels"].tolist().count(5) == 2 and set(seen) == {5, 7}
    out = said(capsys, "sample", "mine/mid", "--n", "4", "--class", "7", "--out", "y.npz")
    assert np.load("y.npz")["labels"].tolist() == [7] * 4 and "uniform over 1 class" in out
    assert "'6' is no class with rows; there are 5, 7" in said(
        capsys, "sample", "mine/mid", "--classes", "5,6", "--out", "z.npz", code=2
    )


def test_an_imported_file_of_more_classes_asks_too_and_its_pipeline_draws_the_datas(tmp_path, monkeypatch, capsys):
    """A public file of three classes, data of two of them, numbered 1 and 2, one of them rare."""
    from diffusers import DiffusionPipeline

    monkeypatch.chdir(tmp_path)
    small.edm2(tmp_path / "net.pkl")
    recipe = small.recipe(tmp_path, small.EDM2)
    images(tmp_path / "data.npz", [1, 2, 2, 2, 2])
    import_ = ["ckpt", "import", "net.pkl", "--recipe", str(recipe), "--out", "run"]
    error = said(capsys, *import_, code=2)
    assert "knows 3 classes, the recipe's 2" in error and "data.class_ids=[1,2] data.classes=3" in error
    said(capsys, *import_, "data.class_ids=[1,2]", "data.classes=3", "eval.batch=10")
    with use("reference"):  # plain torch, as a pipeline is
        said(capsys, "sample", "run/pre", "--n", "10", "--solver", "--steps", "4", "--out", "x.npz")
    found = np.load("x.npz")
    assert sorted(found["labels"].tolist()) == [1] * 2 + [2] * 8
    said(capsys, "ckpt", "export", "run/pre", "pipe", "--format", "diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained("pipe", trust_remote_code=True)
    again = pipe(batch_size=10, num_inference_steps=4, seed=0, output_type="latent").images
    assert np.array_equal(again.numpy(), found["images"])


def test_every_record_of_an_evaluation_says_its_law(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    for law, want in (("data", "data: 10 classes, 10 % to 10 %"), ("uniform", "uniform over 10 classes")):
        out = said(capsys, "eval", "wide/pre", "--steps", "1", "--n", "20", "--labels", law, "--json")
        found = json.loads(out)
        assert found["labels"] == want
        text = said(capsys, "eval", "wide/pre", "--steps", "1", "--n", "20", "--labels", law)
        assert f"labels: {want}\n" in text and "note: 20 samples and 20 rows of the reference for 32 features" in text
    assert "'even' is not valid" in said(capsys, "eval", "wide/pre", "--labels", "even", code=2)


def test_statistics_say_their_law_and_are_not_compared_with_another(world, monkeypatch, capsys):
    """vinhsuhi/LD3#3: random labels in the code, uniform ones in the paper. Statistics of rows that are 1 to 3."""
    monkeypatch.chdir(world)
    if not (world / "mine").exists():
        keys = ["data.class_ids=[5,7]", "data.classes=10"]
        said(capsys, "train", "two.yaml", *keys, "--stages", "mid", *OURS)
    for law in ("data", "uniform"):
        for kind in ("npz", "safetensors"):
            file = f"{law}.{kind}"
            said(capsys, "eval", "mine/mid", "--labels", law, "--make-reference", file)
            said(capsys, "eval", "mine/mid", "--labels", law, "--reference", file, "--steps", "1")
            other = {"data": "uniform", "uniform": "data"}[law]
            error = said(capsys, "eval", "mine/mid", "--labels", other, "--reference", file, "--steps", "1", code=2)
            assert f"eval.labels: '{other}'" in error and f"set eval.labels={law}" in error
    a, b = (np.load(f"{law}.npz") for law in ("data", "uniform"))
    assert abs(a["mu"] - b["mu"]).max() > 1e-6 and str(b["labels"]) == "uniform"


def test_public_statistics_do_not_say_their_law_and_recipes_draw_as_published(world, monkeypatch, capsys):
    """openai/guided-diffusion#56: 50,000 samples of uniformly random classes, against all training images."""
    imagenet = [name for name in recipes.recipes() if name.startswith("imagenet")]
    assert len(imagenet) == 8 and {loading.load(name).eval.labels for name in imagenet} == {"uniform"}
    monkeypatch.chdir(world)
    images(world / "many.npz", [*range(10)] * 3 + [0] * 20)
    about = folder.about_run(world / "wide")
    about["run"]["data"]["path"] = "many.npz"
    del about["data"], about["remembered"]  # of other rows
    (world / "skewed").mkdir(exist_ok=True)
    (world / "skewed" / "run.json").write_text(sound.signed(about | {"parents": "wide"}))
    public = Reference(
        Moments(torch.zeros(32).double(), torch.eye(32).double()), "mu and sigma as ADM and EDM publish them"
    )
    monkeypatch.setattr(references, "read", lambda *_: public)
    arguments = ["eval", "skewed/pre", "--steps", "1", "--n", "50", "--reference", "adm.npz"]
    out = said(capsys, *arguments)
    assert "labels: data: 10 classes, 6 % to 46 %; the reference does not say its own, published figures" in out
    assert "published" not in said(capsys, *arguments, "--labels", "uniform").partition("labels: ")[2]


def test_a_network_that_takes_no_labels_has_no_law_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = small.recipe(tmp_path, small.EDM2 | {"conditional": False})
    error = said(capsys, "train", str(recipe), "eval.labels=uniform", "--dry-run", code=2)
    assert "eval.labels: 'uniform', and the network takes no labels" in error


def test_dry_run_and_stats_print_the_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = small.recipe(tmp_path, DIT)
    images(tmp_path / "data.npz", [5, 17, 402, 402])
    out = said(capsys, "train", str(recipe), "--dry-run")
    assert "classes: 3 (5, 17, 402), 1 to 2 rows each; unbalanced 2:1\n" in out
    stores.make_store(tmp_path / "s", n=30, classes=40)
    out = said(capsys, "data", "stats", "s")
    assert "classes: " in out and "of the network's 40 (" in out and "without rows: " in out


def test_a_run_that_began_with_a_gapped_table_goes_on_with_it(tmp_path, monkeypatch, capsys):
    """run.json says 9 classes for labels 1, 4 and 8: the network stays as it was, the labels too."""
    monkeypatch.chdir(tmp_path)
    recipe = small.recipe(tmp_path, DIT)
    images(tmp_path / "data.npz", [1, 4, 8, 8])
    assert main(["train", str(recipe), "--stages", "pre", "--out", "new"]) == 0
    assert folder.about_run(tmp_path / "new")["rows"] | {} == {
        "shape": [4, 8, 8], "classes": 3, "normalisation": None, "class_ids": [1, 4, 8],
    }  # fmt: skip
    file = tmp_path / "old" / "run.json"
    file.parent.mkdir()
    about = folder.about_run(tmp_path / "new")
    about["rows"] = {"shape": [4, 8, 8], "classes": 9, "normalisation": None}
    file.write_text(sound.signed(about))
    work = Workspace(stored_run(tmp_path / "old"), tmp_path / "old")
    assert work.data.classes == 9 and work.data.labels.tolist() == [1, 4, 8, 8]
    loop.train(work, ["pre"])
    assert folder.about_run(tmp_path / "old")["rows"]["classes"] == 9
    samples = work.setting.labels(torch.arange(8)).tolist()
    assert sorted(set(samples)) == [1, 4, 8] and samples.count(8) == 4


def test_trajectories_on_disk_are_of_classes_with_rows(world, monkeypatch, capsys):
    """Cached trajectories say which classes they start from; others are refused."""
    monkeypatch.chdir(world)
    if not (world / "cache").exists():
        base = ["two.yaml", "data.class_ids=[5,7]", "data.classes=10"]
        said(capsys, "trajectories", *base, "--n", "8", "--cache", "cache")
    index = json.loads((world / "cache" / "index.json").read_text())
    assert index["trajectories"]["drawn"] == [5, 7] and index["classes"] == 10
    assert set(np.load(world / "cache" / "labels.npy").tolist()) <= {5, 7}
    images(world / "three.npz", [4, 7, 7, 7])
    more = ["data.path=three.npz", "data.class_ids=[4,7]", "data.classes=10", "mid.trajectories.cache=cache"]
    error = said(capsys, "train", "two.yaml", *more, "--stages", "mid", "--out", "other", code=2)
    assert "its choice of start labels is 2 classes, 5, 7, this recipe's is 2 classes, 4, 7" in error
    more = ["data.class_ids=[5,7]", "data.classes=10", "mid.trajectories.cache=cache"]
    said(capsys, "train", "two.yaml", *more, "--stages", "mid", "--out", "cached")
