"""A stage goes out as one file or as a pipeline, and what is loaded again gives the same image, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from cmt_fast.config import fingerprint, loading
from cmt_fast.convert import card
from cmt_fast.data.autoencoder import Codec
from cmt_fast.run import workspace
from cmt_fast.storage import checkpoint
from tests.convert.test_import import cmt, same, tensors
from tests.fixtures import small, stores, synthetic

NAME = "small <b>run</b> [x](http://y) | *a*\n---\n# title"


@pytest.fixture(scope="module")
def ve(tmp_path_factory):
    """A run whose `pre` is an imported EDM2 with weights that make something of every input."""
    from cmt_fast import cli

    folder = tmp_path_factory.mktemp("ve")
    small.edm2(folder / "net.pkl")
    recipe = small.recipe(folder, small.EDM2)
    assert (
        cli.main(["ckpt", "import", str(folder / "net.pkl"), "--recipe", str(recipe), "--out", str(folder / "run")])
        == 0
    )
    return folder


def test_safetensors_hold_the_run_and_go_back_in(ve, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    code, said, err = cmt(capsys, "ckpt", "export", ve / "run/pre", out)
    assert code == 0 and "EMA 0" in said, err
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["cmt-fast"])
    weights, manifest = load_file(out), checkpoint.complete(ve / "run/pre").manifest
    assert same(tensors(ve / "run"), weights) and all(t.dtype == torch.float32 for t in weights.values())
    assert loading.build(about["run"]) == loading.load(str(ve / "small.yaml")) and about["digest"] == manifest["config"]
    assert about["lineage"]["ema"] == manifest["files"]["ema-0.safetensors"]["xxh3_128"]
    assert about["lineage"]["parent"]["file"] == "net.pkl"
    arguments = ("--recipe", ve / "small.yaml", "--out", tmp_path / "again")
    code, said, err = cmt(capsys, "ckpt", "import", out, *arguments)
    assert code == 0 and "family cmt-fast" in said, err
    assert same(tensors(tmp_path / "again"), weights)
    chain = checkpoint.complete(tmp_path / "again/pre").manifest["parent"]
    assert [chain["file"], chain["parent"]["stage"], chain["parent"]["parent"]["file"]] == [out.name, "pre", "net.pkl"]
    code, _, err = cmt(capsys, "ckpt", "import", out, *arguments[:2], "--out", tmp_path / "no", "sigma_data=0.3")
    assert code == 2 and "trained with 0.5, the recipe has 0.3; try sigma_data=0.5" in err


def test_nothing_is_overwritten_and_wrong_words_are_named(ve, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, says in (
        ((ve / "run/pre", tmp_path / "there"), "exists already"),
        ((ve / "run/pre", tmp_path / "no/where"), "does not exist"),
        ((ve / "run/mid", tmp_path / "x"), "holds no checkpoint"),
        ((ve / "run/pro", tmp_path / "x"), "did you mean pre"),
        ((ve / "run/pre", tmp_path / "x", "--ema", "3"), "holds no ema-3"),
        ((ve / "run/pre", tmp_path / "x", "--license", "mit"), "is for --format diffusers"),
        (
            (ve / "run/pre", tmp_path / "x", "--format", "diffusers", "--license", "a b\nc"),
            "is no licence's identifier",
        ),
        ((ve / "run/pre", tmp_path / "x", "--format", "diffusers", "--vae", tmp_path), "is no autoencoder's folder"),
        ((ve / "run/pre", tmp_path / "x", "--format", "diffuser"), "did you mean diffusers"),
    ):
        code, _, err = cmt(capsys, "ckpt", "export", *arguments)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_pipeline_gives_the_image_of_the_trainer(ve, tmp_path, capsys, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    from cmt_fast.convert.pipeline import CmtPipeline

    out = tmp_path / "pipe"
    code, _, err = cmt(
        capsys, "ckpt", "export", ve / "run/pre", out, "--format", "diffusers", "--license", "cc-by-nc-sa-4.0"
    )
    assert code == 0, err
    work, _ = workspace.open_stage(str(ve / "run/pre"))
    want = work.setting.generate(work.network("pre"), 4, 5, 3, solver=True)
    assert want.std() > 0.01 and torch.isfinite(want).all()
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(out)
    ours = CmtPipeline.from_pretrained(str(out))
    theirs = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert type(theirs) is CmtPipeline
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        got = pipe(batch_size=5, num_inference_steps=4, seed=3, output_type="latent").images
        assert got.dtype == torch.float32 and torch.equal(got.cpu(), want)
    # noise and classes of one's own
    noise = work.setting.noise(3, torch.arange(5))
    given = ours(class_labels=[0, 1, 2, 0, 1], latents=noise, num_inference_steps=4, output_type="latent").images
    assert torch.equal(given, want)
    other = ours(class_labels=[2, 2, 2, 2, 2], latents=noise, num_inference_steps=4, output_type="latent").images
    assert torch.equal(other[2], want[2]) and not torch.equal(other[0], want[0])
    for wrong, says in (
        ({"class_labels": 3}, "0 to 2"),
        ({"latents": noise[:, :1]}, "latents"),
        ({"output_type": "png"}, "pil"),
    ):
        with pytest.raises(ValueError, match=says):
            ours(**wrong)
    with pytest.raises(ValueError, match="are no images"):
        ours()


def test_pipeline_of_a_few_step_network_on_the_linear_path_makes_pictures(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from cmt_fast.convert.pipeline import CmtPipeline

    recipe = small.recipe(tmp_path, {"kind": "dit", "width": 16, "depth": 1, "heads": 2}, "linear", channels=3)
    run = loading.load(str(recipe))
    work = workspace.Workspace(run, tmp_path / "run")
    work.claim()
    torch.manual_seed(1)
    weights = {k: torch.randn(t.shape) * 0.2 for k, t in work.build().state_dict().items()}
    about = {
        "stage": "post",
        "nimg": 8,
        "done": True,
        "recipe": run.name,
        "config": fingerprint.stage_digest(run, "post"),
    }
    files = {"model": weights, "ema-0": weights}
    checkpoint.save(tmp_path / "run/post", 2, files, {**about, "parent": None, "wall": {}})
    assert cmt(capsys, "ckpt", "export", tmp_path / "run/post", tmp_path / "pipe", "--format", "diffusers")[0] == 0
    pipe = CmtPipeline.from_pretrained(str(tmp_path / "pipe"))
    for steps in (1, 2, 3):
        want = work.setting.generate(work.network("post"), steps, 4, 9)
        assert torch.equal(pipe(batch_size=4, num_inference_steps=steps, seed=9, output_type="latent").images, want)
    pictures = pipe(batch_size=4, num_inference_steps=3, seed=9).images
    assert len(pictures) == 4 and pictures[0].size == (8, 8) and pictures[0].mode == "RGB"
    numbers = pipe(batch_size=4, num_inference_steps=3, seed=9, output_type="pt").images
    assert torch.equal(numbers, (want / 2 + 0.5).clamp(0, 1))


def test_latents_are_decoded_by_the_autoencoder_in_the_folder(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    from cmt_fast.convert.pipeline import CmtPipeline

    synthetic.vae(tmp_path / "vae", factor=2, width=8)
    synthetic.vae(tmp_path / "other", seed=1, factor=2, width=8)
    made_by = ("some/vae", Codec.open(str(tmp_path / "vae"), "cpu").digest)
    shape = (4, small.SIDE, small.SIDE)
    store = stores.make_store(tmp_path / "store", n=20, shape=shape, classes=small.CLASSES, vae=made_by)
    tree = yaml.safe_load(small.recipe(tmp_path, small.EDM2).read_text())
    tree["data"] = {"kind": "latents", "path": str(store.folder)}
    recipe = tmp_path / "latents.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    small.edm2(tmp_path / "net.pkl")
    code, out, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", tmp_path / "run")
    assert code == 0 and "WARNING: the network was trained on latents" in out, err
    arguments = ("ckpt", "export", tmp_path / "run/pre", tmp_path / "pipe", "--format", "diffusers", "--vae")
    code, _, err = cmt(capsys, *arguments, tmp_path / "other")
    assert code == 2 and "is not the autoencoder that made the latents" in err and not (tmp_path / "pipe").exists()
    code, _, err = cmt(capsys, *arguments, tmp_path / "vae")
    assert code == 0 and "some/vae" in (tmp_path / "pipe/README.md").read_text().replace("\\", ""), err
    work, _ = workspace.open_stage(str(tmp_path / "run/pre"))
    want = work.decoding.codec(str(tmp_path / "vae")).decode(
        work.setting.generate(work.network("pre"), 2, 3, 5, solver=True)
    )
    for pipe in (
        CmtPipeline.from_pretrained(str(tmp_path / "pipe")),
        CmtPipeline.from_pretrained(
            str(tmp_path / "pipe"), vae=diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        ),
    ):
        got = pipe(batch_size=3, num_inference_steps=2, seed=5, output_type="pt").images
        assert got.shape == (3, 3, 16, 16) and torch.equal(got, (want / 2 + 0.5).clamp(0, 1))
    assert cmt(capsys, "ckpt", "export", tmp_path / "run/pre", tmp_path / "bare", "--format", "diffusers")[0] == 0
    bare = CmtPipeline.from_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="latents of 'some/vae'"):
        bare(batch_size=1, num_inference_steps=2)


def test_card_escapes_what_users_wrote_and_says_where_weights_come_from(ve, tmp_path, capsys):
    work, _ = workspace.open_stage(str(ve / "run/pre"))
    tree = loading.dump(work.run) | {"name": NAME}
    hostile = workspace.Workspace(loading.build(tree), ve / "run")
    lineage = {"stage": "pre", "nimg": 0, "config": "c" * 64, "ema": "e" * 32, "step": 0}
    file = {
        "file": "<script>|x|.pkl",
        "sha256": "0" * 64,
        "family": "edm2",
        "entry": "ema",
        "stage": "import",
        "nimg": 0,
    }
    lineage["parent"] = file | {"config": None, "ema": "0" * 64, "parent": None}
    about = {"version": "1", "digest": "d", "lineage": lineage}
    text = card.markdown(hostile, "pre", about, None, None)
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown" and front["library_name"] == "diffusers"
    nothing = {"gpu_hours": None, "core_hours": None, "kwh": None, "stages": []}
    assert front["cmt_fast"] == {"version": "1", "digest": "d", **nothing}
    page = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
    assert "<b>" not in page and "<script>" not in page and "\n# title" not in page and "[x](http" not in page
    assert r"\<b\>run" in page and "Not evaluated" in page and "what its licence asks holds" in page
    (ve / "run/pre/figures.json").write_text(
        json.dumps(
            {
                "key": {"ema": "e" * 32, "eval": {"n": 4000, "seed": 7}, "extractor": "some|features"},
                "few": {"1": {"frechet": 3.25}, "2": None},
                "solver": {"16": {"frechet": 1.5}},
            }
        )
    )
    body = card.markdown(hostile, "pre", about, "mit", None)
    assert "4,000 samples of these weights, seed 7" in body
    assert "| 1, few-step | 3.25 |" in body and "| 16, ODE solver | 1.5 |" in body
    (ve / "run/pre/figures.json").unlink()
