"""Public checkpoints become the finished stage `pre`: every tensor, or a line that says what does not fit."""

from __future__ import annotations

import argparse
import json
import types

import pytest
import torch
from cmt_kernels import use
from safetensors.torch import save_file

from cmt_fast import cli, models
from cmt_fast.config import loading
from cmt_fast.convert import families, fitting, names
from cmt_fast.run import workspace
from cmt_fast.storage import checkpoint
from tests.fixtures import small
from tests.fixtures.stores import make_store


def cmt(capsys, *arguments) -> tuple[int, str, str]:
    """The command in this process: exit code, what it printed, what it complained of."""
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def tensors(run) -> dict[str, torch.Tensor]:
    found = checkpoint.complete(run / "pre")
    model, ema = found.tensors("model"), found.tensors("ema-0")
    assert model.keys() == ema.keys() and all(torch.equal(model[k], ema[k]) for k in model)
    return ema


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k].float()) for k in a)


def test_edm2_snapshot_becomes_the_stage_pre_and_is_trained_on(tmp_path, capsys):
    state = small.edm2(tmp_path / "net.pkl")
    recipe, run = small.recipe(tmp_path, small.EDM2), tmp_path / "run"
    code, out, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", run)
    assert code == 0, err
    assert f"family edm2: {len(state)} tensors matched" in out and "0 missing, 0 of another shape" in out
    assert "float16 became float32 exactly" in out and "img_resolution 8" in out and "the data do not say theirs" in out
    assert same(tensors(run), names.edm2(state))
    manifest = checkpoint.complete(run / "pre").manifest
    parent = manifest["parent"]
    assert (parent["file"], parent["family"], parent["entry"], parent["class"]) == ("net.pkl", "edm2", "ema", "Node")
    assert len(parent["sha256"]) == 64 and parent["init_kwargs"] == small.ARGUMENTS and manifest["nimg"] == 0
    work, _ = workspace.open_stage(str(run / "pre"))
    mine, x, t = work.build(), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 2.0])
    mine.load_state_dict({k: v.float() for k, v in names.edm2(state).items()})
    with torch.no_grad(), use("reference"):  # a frozen network's weights are folded by it
        assert torch.equal(work.network("pre")(x, t, t, torch.tensor([0, 2])), mine(x, t, t, torch.tensor([0, 2])))
    code, _, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", run)
    assert code == 2 and "holds checkpoints already" in err
    work = workspace.Workspace(loading.load(str(recipe)), tmp_path / "more", run)
    from cmt_fast.train import loop

    loop.train(work, ["mid"])
    later = checkpoint.complete(tmp_path / "more" / "mid").manifest["parent"]
    assert later["stage"] == "pre" and later["parent"]["sha256"] == parent["sha256"]


def test_what_disagrees_is_refused_with_the_overrides_that_fit(tmp_path, capsys):
    state = small.edm2(tmp_path / "net.pkl", half=False, sigma_data=1.0)
    recipe = small.recipe(tmp_path, {"kind": "edm2", "head": 8, "width": 16, "multipliers": [1, 2], "attention": [4]})
    arguments = ("ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", tmp_path / "run")
    code, out, err = cmt(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "conflict: sigma_data: the file's network was trained with 1, the recipe has 0.5" in out
    assert "conflict: model.width: the file's network has 8, the recipe's 16" in out
    overrides = err.strip().rpartition("; try ")[2].split(" ")
    assert sorted(overrides) == ["model.blocks=1", "model.width=8", "sigma_data=1"]
    code, out, err = cmt(capsys, *arguments, *overrides)
    assert code == 0, err
    assert same(tensors(tmp_path / "run"), names.edm2(state)) and "became float32" not in out


def test_other_sizes_classes_and_paths_are_conflicts(tmp_path, capsys):
    small.edm2(tmp_path / "net.pkl", label_dim=7, img_resolution=64)
    recipe = small.recipe(tmp_path, small.EDM2)
    _, out, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", tmp_path / "run")
    assert "network is for 4 x 64 x 64, the data are 4 x 8 x 8" in out and "knows 7 classes, the recipe's 3" in out
    recipe = small.recipe(tmp_path, small.EDM2, "linear", name="flow")
    code, out, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", tmp_path / "run")
    assert code == 2 and "path: the file's network is for 've', the recipe's path is 'linear'" in out


def test_missing_unknown_and_broken_tensors(tmp_path, capsys):
    recipe, state = small.recipe(tmp_path, small.EDM2), {k: v.contiguous() for k, v in small.edm2_state().items()}
    arguments = ("--recipe", recipe, "--out", tmp_path / "run")

    def complaint(**changes) -> str:
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        save_file(changed, tmp_path / "net.safetensors")
        code, _, err = cmt(capsys, "ckpt", "import", tmp_path / "net.safetensors", *arguments)
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
        return err

    assert "1 tensors missing" in complaint(**{"unet.out_conv.weight": None})
    assert "'unet.more' is no tensor of this family" in complaint(**{"unet.more": torch.ones(2)})
    broken = state["unet.out_conv.weight"].clone()
    broken[0, 0, 0, 0] = float("nan")
    assert "is not finite" in complaint(**{"unet.out_conv.weight": broken})
    shape = complaint(**{"unet.out_conv.weight": torch.ones(5, 8, 3, 3)})
    assert "1 of another shape; first: net.out.weight is (5, 8, 3, 3), not (4, 8, 3, 3)" in shape
    save_file({"encoder.layer": torch.ones(2)}, tmp_path / "other.safetensors")
    code, _, err = cmt(capsys, "ckpt", "import", tmp_path / "other.safetensors", *arguments)
    assert code == 2 and "of no known family (its first tensor is 'encoder.layer')" in err


def test_sit_training_file(tmp_path, capsys):
    path, recipe = tmp_path / "0010000.pt", small.recipe(tmp_path, small.SIT, "linear")
    args = argparse.Namespace(model="SiT-S/2", path_type="Linear", prediction="velocity")
    torch.save({"model": small.sit_state(1), "ema": small.sit_state(0), "args": args}, path)
    for seed, entry in enumerate(((), ("--ema", "model"))):
        run = tmp_path / f"run-{seed}"
        code, out, err = cmt(capsys, "ckpt", "import", path, "--recipe", recipe, "--out", run, *entry)
        assert code == 0, err
        assert same(tensors(run), names.sit(small.sit_state(seed)))
        assert (
            "family sit" in out and "skipped: pos_embed" in out and "recipe's 2 are taken" in out and "0.18215" in out
        )
    args.prediction = "noise"
    torch.save({"ema": small.sit_state(0), "args": args}, path)
    code, out, err = cmt(capsys, "ckpt", "import", path, "--recipe", recipe, "--out", tmp_path / "no")
    assert code == 2 and "trained with prediction 'noise'" in err
    # nothing in a tensor's shape tells whether a transformer rotates its queries
    code, out, err = cmt(
        capsys, "ckpt", "import", path, "--recipe", recipe, "--out", tmp_path / "no", "model.rope=true"
    )
    assert code == 2 and "model.rope: the file's network has false, the recipe's true" in out


@pytest.mark.parametrize("scale, says", [(0.5, "are scaled as the network's were"), (1.0, "WARNING")])
def test_the_scale_of_latents_is_compared(scale, says):
    asks = families.Asks({}, affine=([0.25, 0.5], [0.5, -1.0]))
    data = types.SimpleNamespace(normalisation=types.SimpleNamespace(mean=(-2.0, 2.0), std=(2.0, 1.0), scale=scale))
    (said,) = fitting.normalisation(asks, data)
    assert says in said and ("data.mean=[-2,2] data.std=[2,1] data.scale=0.5" in said) == (says == "WARNING")
    sd = families.Asks({}, affine=families.SD)
    data.normalisation = types.SimpleNamespace(mean=(0.0,) * 4, std=(1.0,) * 4, scale=0.18215)
    assert "are scaled as" in fitting.normalisation(sd, data)[0]


def test_a_report_of_an_imported_run_and_its_manifest_are_plain_json(tmp_path, capsys):
    small.edm2(tmp_path / "net.pkl")
    run = tmp_path / "run"
    recipe = small.recipe(tmp_path, small.EDM2)
    assert cmt(capsys, "ckpt", "import", tmp_path / "net.pkl", "--recipe", recipe, "--out", run)[0] == 0
    code, out, _ = cmt(capsys, "ckpt", "verify", run)
    assert code == 0 and "step-00000000: sound" in out
    manifest = json.loads((run / "pre/checkpoints/step-00000000/manifest.json").read_text())
    assert manifest["done"] and manifest["parent"]["encoder"]["state"]["scale"] == [0.5, 0.25]


def test_a_recipe_that_names_runs_which_are_not_there_yet(tmp_path, capsys, monkeypatch):
    """Its networks are imported one by one: none waits for the others, for DeepSpeed or for the judge's files."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=3)
    model = "model={kind: edm2, width: 16, multipliers: [1, 2], blocks: 1, attention: [4], head: 8, dropout: 0.0}"
    where = ["data.path=store", "data.expects=null", "data.mean=null", "data.std=null", model]
    net = models.build(loading.load("imagenet512-ecd", where).model, "ve", 0.5, (4, 8, 8), 3)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, "teacher.safetensors")
    given = ["teacher.safetensors", "--recipe", "imagenet512-ecd", *where, "--out", "run"]
    code, said, wrong = cmt(capsys, "ckpt", "import", *given)
    assert code == 0, wrong
    assert checkpoint.complete(tmp_path / "run" / "pre").manifest["stage"] == "pre"
    assert f"cmt train imagenet512-ecd {where[0]}" in said
    code, _, wrong = cmt(
        capsys, "ckpt", "import", "teacher.safetensors", "--recipe", "imagenet256-mf", "--out", "other"
    )
    assert code == 2 and "no stage pre" in wrong
