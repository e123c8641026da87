"""A stage goes out as one file, which goes in again; what cannot be written is refused before anything is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cmt_fast.config import loading
from cmt_fast.storage import checkpoint
from tests.convert.test_import import cmt, same, tensors
from tests.fixtures import small


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
    run = loading.dump(loading.load(str(ve / "small.yaml")))
    assert run["data"].pop("path") == str(ve / "data.npz") and about["run"]["data"].pop("path") == "data.npz"
    assert about["run"] == run and about["digest"] == manifest["config"]
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
        ((ve / "run/pre", tmp_path / "x", "--ema", "3"), "--ema: 3 is no EMA of pre, which has 0 alone"),
        ((ve / "run/pre", tmp_path / "x"), "does not end in .safetensors"),
        ((ve / "run/pre", tmp_path / "x.onnx"), "does not end in .safetensors; --format onnx writes such a one"),
        (
            (ve / "run/pre", tmp_path / "x.pt", "--format", "diffusers"),
            "is the name of a file, and a folder is written",
        ),
        ((ve / "run/pre", tmp_path / "x", "--license", "mit"), "is for --format diffusers"),
        ((ve / "run/pre", tmp_path / "x", "--data-license", "mit"), "--data-license: is for --format diffusers"),
        (
            (ve / "run/pre", tmp_path / "x", "--format", "diffusers", "--teacher-license", "<x>"),
            "--teacher-license: '<x>' is no licence's identifier",
        ),
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
