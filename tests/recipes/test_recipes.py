"""Every recipe of the package: valid as it stands, and two steps of each of its stages in a shrunk form, by the command."""

from __future__ import annotations

import shutil
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
RESUMED = ("imagenet256-rae", "imagenet256-imf")  # networks and inputs that no other recipe has
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
        channels = min(expects.shape[0], 16)  # RAE's latents have 768
        shape, classes = (channels, *((16, 16) if pixels else (8, 8))), 3 if labelled else 0
        kind = (shape, classes, run.data.flip)
        if kind not in made:
            made[kind] = folder / f"{len(made)}"
            make_store(made[kind], 48, shape, classes=classes, pixels=pixels, flips=run.data.flip)
        random = ["data.unchecked=true"] if getattr(run.data, "mean", None) else []  # no autoencoder's mean and std
        return [f"data.path={made[kind]}", f"data.expects={{shape: {list(shape)}, classes: {classes}}}", *random]

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
    out += ["model.velocity_head=1"] if getattr(run.model, "velocity_head", None) is not None else []
    if getattr(run.model, "wide_head", None):
        out += ["model.wide_head={width: 32, depth: 1, heads: 2}"]
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
        batch = (
            2 * BATCH if stage.anchor and hasattr(stage.objective, "ratio") else BATCH
        )  # a row with a tangent is left
        out += [f"{name}.images_nimg={2 * batch}", f"{name}.batch={batch}", f"{name}.warmup_nimg=0"]
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
        recipe not in ("digits", "digits-mf", "photos", "gmm")
    )
    run = loading.load(recipe)
    if recipe in PUBLISHED:
        parameters, *batches = PUBLISHED[recipe]
        assert int(said.split()[2].replace(",", "")) == pytest.approx(parameters, rel=1e-3)
        assert [run.stages[s].batch for s in ("pre", "mid", "post")] == batches


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_works_where_data_are_not_and_names_what_to_bring(
    recipe: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = loading.load(recipe)
    assert main(["train", recipe, "--dry-run"]) == 0
    written = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")]
    assert written == ([] if run.data.kind == "latents" else [f"runs/{recipe}-look.png"])
    said = capsys.readouterr().out.splitlines()
    lines = [line.strip() for line in said]
    assert [n for n in run.stages if any(line.startswith(f"{n}: ") and " steps, " in line for line in lines)] == list(
        run.stages
    )
    missing = [line.removeprefix("not here: ") for line in said if line.startswith("not here: ")]
    if run.data.kind != "latents":
        assert not missing
        return
    assert run.data.expects and f"of {run.data.expects.shape}" in next(x for x in lines if " parameters; device " in x)
    assert missing[0].startswith(f"data.path: {run.data.path!r} is not a folder; make it by `cmt data encode ")
    named = [s.perceptual.weights for s in run.stages.values() if s.perceptual] + [str(run.eval.weights)]
    named += [str(Path(name).parent) for name in other_runs(run)]
    assert all(any(name in line for line in missing) for name in named)
    assert main(["train", recipe]) == 2  # as an error, and nothing is written
    assert capsys.readouterr().err.strip() == f"cmt: {len(missing)} things are missing: {' | '.join(missing)}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_every_stage(recipe: str, stores, vgg16: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a fifth of a second each; test_page.py draws them
    monkeypatch.setattr(plots, "svg", lambda *_, **size: "<svg></svg>")
    run = loading.load(recipe)
    if run.data.kind == "gmm":  # a minute of measuring, which test_gmm_world.py does on its own
        monkeypatch.setattr(page, "theory", lambda *folders: {})
        monkeypatch.setattr(sections, "theory", lambda figures: sections.Section("", [], []))
    small = [*shrunk(run), *stores(run)]
    for k, name in enumerate(sorted(other_runs(run))):  # another network of its kind, trained as its own stage `pre`
        source = "imagenet256-mf-teacher" if run.pre is None else recipe
        own = [*shrunk(loading.load(source)), *stores(run), "model.width=24", f"seed={5 + k}", "--stages", "pre"]
        assert main(["train", source, *own, "--out", str(Path(name).parent)]) == 0
    for name in run.stages:
        if run.stages[name].perceptual:
            weights = vgg16
            if "latent_lpips" in run.stages[name].distances():
                features = [
                    *stores(run),
                    "features.width=4",
                    "features.epochs=1",
                    "features.batch=16",
                    "features.holdout=0.1",
                ]
                assert main(["train-features", recipe, *features, "--out", "features"]) == 0
                weights = tmp_path / "features" / "latent_vgg.safetensors"
            small.append(f"{name}.perceptual.weights={weights}")
    small += [f"{name}.checkpoint_every_nimg={BATCH}" for name in run.stages if recipe in RESUMED]
    assert main(["train", recipe, *small, "--out", "run"]) == 0
    for name in run.stages:
        assert checkpoint.complete(Path("run") / name).manifest["step"] == 2
        losses = [r["loss"] for r in metrics(Path("run") / name) if r["kind"] == "train"]
        assert losses and all(0 < x < 1e6 for x in losses)
    assert Path("run/report.html").is_file()
    if recipe in RESUMED:  # each stage taken back to its first step: the same command ends with the same bits
        shutil.copytree("run", "again")
        for name in run.stages:
            shutil.rmtree(checkpoint.folder_of(Path("again") / name, 2))
        assert main(["train", recipe, *small, "--out", "again"]) == 0
        for name in run.stages:
            once, twice = (checkpoint.complete(Path(folder) / name).manifest for folder in ("run", "again"))
            assert once["step"] == twice["step"] == 2 and once["files"] == twice["files"]
