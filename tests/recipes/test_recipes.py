"""Every recipe of the package: valid as it stands, and two steps of each of its stages in a shrunk form, by the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmt_fast.cli import main
from cmt_fast.config import loading, recipes
from cmt_fast.config.schema import Run
from cmt_fast.render import plots
from cmt_fast.report import page, sections
from cmt_fast.storage import checkpoint
from tests.fixtures.stores import make_store
from tests.fixtures.tiny import metrics
from tests.perceptual.test_perceptual import vgg16_weights

RECIPES = sorted(recipes.recipes())
BATCH = 8
NETWORKS = {
    "dit": ["width=16", "depth=1", "heads=2"],
    "edm": ["width=16", "multipliers=[1,2]", "blocks=1", "attention=[8]"],
    "edm2": ["width=16", "multipliers=[1,2]", "blocks=1", "attention=[4]", "head=8"],
    "mlp": ["width=16", "depth=1"],
}
# in which order of magnitude the published networks are, and how many classes they know
PUBLISHED = {
    "cifar10": (55.7e6, 512, 128, 128),
    "ffhq64": (61.8e6, 256, 128, 128),
    "afhqv2-64": (61.8e6, 256, 128, 128),
    "imagenet512-ecd": (1523e6, 2048, 128, 128),
}


def other_runs(run: Run) -> set[str]:
    """The stages of other runs that a recipe names."""
    return {name for stage in run.stages.values() for name in stage.networks().values() if "/" in name}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Callable[[Run], list[str]]:
    """A small store like the one that a recipe expects, and the overrides that name it."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def store(run: Run) -> list[str]:
        expects = getattr(run.data, "expects", None)
        if expects is None:
            return ["data.n=64"] if run.data.kind == "gmm" else []
        pixels, labelled = expects.shape[0] == 3, bool(expects.classes)
        shape, classes = (expects.shape[0], *((16, 16) if pixels else (8, 8))), 3 if labelled else 0
        if (shape, classes) not in made:
            made[shape, classes] = folder / f"{len(made)}"
            make_store(made[shape, classes], 48, shape, classes=classes, pixels=pixels)
        path = f"data.path={made[shape, classes]}"
        random = ["data.unchecked=true"] if getattr(run.data, "mean", None) else []  # no autoencoder's mean and std
        return [path, f"data.expects={{shape: {list(shape)}, classes: {classes}}}", *random]

    return store


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory) -> Path:
    """A VGG16 with LPIPS' heads, random."""
    file = tmp_path_factory.mktemp("weights") / "vgg.pt"
    torch.save(vgg16_weights(), file)
    return file


def shrunk(run: Run) -> list[str]:
    """Two steps of a small batch for every stage, a small network, figures of a few samples; nothing else changes."""
    out = [f"model.{setting}" for setting in NETWORKS[run.model.kind]] + ["engine=local"]
    out += [
        "sampler.teacher_steps=4",
        "eval.n=16",
        "eval.n_during=16",
        "eval.batch=16",
        "eval.metric=frechet",
        "eval.weights=null",
        "eval.reference=null",
    ]
    for name in run.stages:
        stage = run.stages[name]
        out += [f"{name}.images_nimg={2 * BATCH}", f"{name}.batch={BATCH}", f"{name}.warmup_nimg=0"]
        out += [f"{name}.lr_knee_nimg={BATCH}"] if stage.lr_knee_nimg else []
        out += [f"{name}.{key}_every_nimg=null" for key in ("eval", "grid", "snapshot")]
        if stage.trajectories:
            out += [f"{name}.trajectories.pool_steps=2", f"{name}.trajectories.per_trajectory=4"]
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_where_its_data_are_not(recipe: str, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "validate", recipe]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{recipe}: valid, ") and ("is not here" in said) == (
        recipe not in ("digits", "digits-mf", "gmm")
    )
    run = loading.load(recipe)
    if recipe in PUBLISHED:
        parameters, *batches = PUBLISHED[recipe]
        assert int(said.split()[2].replace(",", "")) == pytest.approx(parameters, rel=1e-3)
        assert [run.stages[s].batch for s in ("pre", "mid", "post")] == batches


# what arXiv 2509.24526 and its published scripts say of ImageNet-512
IMAGENET512 = {
    "model.size": "XXL", "model.dropout": 0.0, "sigma_data": 0.5,
    "mid.images_nimg": 12_800_000, "mid.batch": 128, "mid.lr": 2e-4, "mid.lr_schedule": "linear", "mid.betas": [0.9, 0.999],
    "mid.grad_clip_norm": 0.0, "mid.ema.0.beta": 0.999, "mid.ema.0.ramp": False, "mid.objective.distance": "latent_lpips",
    "mid.trajectories.solver": "dpmpp", "mid.trajectories.order": 3, "mid.trajectories.nfe": 16,
    "mid.trajectories.t_max": 80.0, "mid.trajectories.t_min": 0.002, "mid.trajectories.guidance": 1.0,
    "post.images_nimg": 16_000_000, "post.batch": 128, "post.lr": 1e-6, "post.lr_schedule": "constant",
    "post.betas": [0.9, 0.99], "post.ema.0.beta": 0.9999, "post.ema.0.ramp": False, "post.precision": "tf32",
    "post.objective.kind": "ecd", "post.objective.mean": -0.8, "post.objective.std": 1.6, "post.objective.q": 1024.0,
    "post.objective.doublings": 0, "post.objective.c": 0.06, "post.objective.weight": "snr", "post.objective.step": "heun",
    "post.autoguidance.scale": 2.05, "sampler.mid_times.2": [1.526], "features.epochs": 100, "features.lr": 0.1,
}  # fmt: skip


def test_imagenet512_is_the_published_run() -> None:
    """Printed as a table: key, published, ours."""
    tree, differs = loading.dump(loading.load("imagenet512-ecd")), []
    for key, published in IMAGENET512.items():
        ours = tree
        for part in key.split("."):
            ours = ours[int(part)] if isinstance(ours, list) else ours[part]
        print(f"{key:28} {published!s:14} {ours!s}")
        differs += [key] * (ours != published)
    assert not differs


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_every_stage(recipe: str, stores, vgg16: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a fifth of a second each; test_page.py draws them
    monkeypatch.setattr(plots, "svg", lambda *_, **size: "<svg></svg>")
    run = loading.load(recipe)
    if run.data.kind == "gmm":  # a minute of measuring, which test_gmm_world.py does on its own
        monkeypatch.setattr(page, "theory", lambda folder: {})
        monkeypatch.setattr(sections, "theory", lambda figures: sections.Section("", [], []))
    small = [*shrunk(run), *stores(run)]
    for name in sorted(other_runs(run)):  # another network of its kind, trained as its own stage `pre`
        source = "imagenet256-mf-teacher" if run.pre is None else recipe
        own = [*shrunk(loading.load(source)), *stores(run), "model.width=24", "seed=5", "--stages", "pre"]
        assert main(["train", source, *own, "--out", str(Path(name).parent)]) == 0
    for name in run.stages:
        if run.stages[name].perceptual:
            weights = vgg16
            if "latent_lpips" in run.stages[name].distances():
                features = [*stores(run), "features.width=4", "features.epochs=1", "features.batch=16"]
                assert main(["train-features", recipe, *features, "--out", "features"]) == 0
                weights = tmp_path / "features" / "latent_vgg.safetensors"
            small.append(f"{name}.perceptual.weights={weights}")
    assert main(["train", recipe, *small, "--out", "run"]) == 0
    for name in run.stages:
        assert checkpoint.complete(Path("run") / name).manifest["step"] == 2
        losses = [r["loss"] for r in metrics(Path("run") / name) if r["kind"] == "train"]
        assert losses and all(0 < x < 1e6 for x in losses)
    assert Path("run/report.html").is_file()
