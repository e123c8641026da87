"""A stage as a folder that diffusers loads where nothing of ours is installed, and its card."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml
from safetensors.torch import load_file

from cmt_fast import cli
from cmt_fast.config import loading
from cmt_fast.config.schema import Model
from cmt_fast.convert import card, diffusers_folder, exporting
from cmt_fast.run import judging, workspace
from cmt_fast.storage import checkpoint
from tests.convert import folders
from tests.convert.test_import import cmt
from tests.fixtures import forked, small, synthetic

NAME = "small <b>run</b> [x](http://y) | *a*\n---\n# title"
DATA = Path(__file__).parents[2] / "docs" / "data.md"
CODE = Path(diffusers_folder.__file__).parent / "standalone"
THOROUGH = ("dit-latents", "edm2-guided", "mlp-jumps")  # those of which every promise is asked


@pytest.fixture(scope="module")
def ve(tmp_path_factory):
    """A run whose `pre` is an imported EDM2."""
    folder = tmp_path_factory.mktemp("ve")
    small.edm2(folder / "net.pkl")
    recipe = small.recipe(folder, small.EDM2)
    arguments = ["--recipe", str(recipe), "--out", str(folder / "run")]
    assert cli.main(["ckpt", "import", str(folder / "net.pkl"), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Every kind of network's folder, and what was found of it where imports of ours raise: lines by folder."""
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("folders")
    folders.write(out)
    command = [*forked.python("torch"), str(Path(folders.__file__).with_name("clean_export.py")), str(out), *THOROUGH]
    found = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300, cwd=out)
    lines = [line for line in found.stdout.splitlines() if " yes " in line or " NO " in line]
    assert found.stdout.endswith(" promises broken\n"), found.stderr
    return {name: [line for line in lines if line.split()[0] == name] for name in folders.CASES}


@pytest.mark.parametrize("name", folders.CASES)
def test_a_folder_stands_alone_and_gives_the_samples_of_the_trainer(said, name):
    lines, case = said[name], folders.CASES[name]
    assert [line for line in lines if " NO " in line] == []
    equal = [line for line in lines if "equal bits" in line and " steps" in line]
    times = 4 if name in THOROUGH else 2  # loaded, after all others, saved again, from_pipe
    assert len(equal) == times * len(case.steps) and (len(lines) > 20) == (name in THOROUGH)


def test_every_kind_of_network_and_path_has_a_folder():
    """A model that is added to the schema is added here."""
    kinds = {model.kind for model in get_args(get_args(Model)[0])}
    assert {(c.model["kind"], c.path) for c in folders.CASES.values()} >= {
        (k, p) for k in kinds for p in ("ve", "linear")
    }


def test_files_that_stand_alone_share_their_code_word_for_word():
    """Each has all that it needs, so what is common to the networks stands in several files."""
    found: dict[str, set[str]] = {}
    for file in CODE.glob("cmt_*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(node.name, set()).add(ast.unparse(node))
    once = {
        "Network",
        "TimeEmbedder",
        "attention",
        "resample",
        "walk",
    }  # which differ with their network: NCSN++ filters
    assert {name for name, texts in found.items() if len(texts) > 1} <= once
    assert len(found["Network"]) == 2, "they differ in the layer that has the dtype"


def test_latents_are_decoded_by_the_autoencoder_that_made_them(tmp_path, capsys):
    pytest.importorskip("diffusers")
    stage = folders.finished(tmp_path, folders.CASES["dit-latents"])
    synthetic.vae(tmp_path / "other", seed=1, factor=2, width=8)
    arguments = ("ckpt", "export", stage, tmp_path / "pipe", "--format", "diffusers", "--vae")
    code, _, err = cmt(capsys, *arguments, tmp_path / "other")
    assert code == 2 and "is not the autoencoder that made the latents" in err and not (tmp_path / "pipe").exists()


def test_licences_are_asked_for_and_an_edm2_is_folded(ve, tmp_path, capsys):
    out = tmp_path / "pipe"
    given = ("--license", "MIT", "--data-license", "cc-by-4.0")  # the hub's words are in small letters
    code, text, err = cmt(capsys, "ckpt", "export", ve / "run/pre", out, "--format", "diffusers", *given)
    assert code == 0 and "the card says 'not stated'; say them with --teacher-license" in text, err
    page = (out / "README.md").read_text()
    assert "license: mit" in page and "These weights: MIT. The data: cc-by-4.0." in page
    assert "net.pkl" in page and ": not stated; what its licence asks holds for these weights too." in page
    for file in filter(Path.is_file, out.rglob("*")):  # a folder that is given away tells nothing of this machine
        assert str(ve).encode() not in file.read_bytes(), file
    assert "path: data.npz" in page
    weights = load_file(out / "network/diffusion_pytorch_model.safetensors")
    length = weights["conv.weight"].flatten(1).norm(dim=1)
    assert ((length - 1).abs() < 1e-3).all() and not [k for k in weights if "log_variance" in k]


def test_whose_the_built_in_data_are_is_said_unasked():
    work, about = SimpleNamespace(run=loading.load("photos")), {"lineage": None}
    (said, _) = card._licences(work, about, card.Terms())
    rows = re.findall(r"^\| (\w+) \| `\w+\.\w+` of .* \| (CC.*|public domain) \|$", DATA.read_text("utf-8"), re.M)
    assert len(rows) == 6 and all(re.search(rf"{name} by [^;]+ \({re.escape(terms)}\)", said) for name, terms in rows)
    assert card.unsaid(work, about, card.Terms()) == ["--license"]
    assert card.unsaid(SimpleNamespace(run=loading.load("digits")), about, card.Terms("mit")) == []


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
    what = diffusers_folder.described(exporting.collect(work, "pre"))
    text = card.markdown(hostile, "pre", about, card.Terms(), what)
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown" and front["library_name"] == "diffusers"
    nothing = {"gpu_hours": None, "core_hours": None, "kwh": None, "stages": []}
    assert front["cmt_fast"] == {"version": "1", "digest": "d", **nothing}
    assert "What training took was not recorded." in body
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
    body = card.markdown(hostile, "pre", about, card.Terms("mit"), what)
    assert "4,000 samples of these weights, seed 7" in body
    assert "| this (pre) | 1, few-step | 3.25 |" in body and "| this (pre) | 16, ODE solver | 1.5 |" in body
    (ve / "run/pre/figures.json").unlink()


def test_a_licence_without_a_word_of_the_hub_is_another_one_with_a_name():
    assert card.Terms("GPL-3.0-only").front == {"license": "other", "license_name": "gpl-3.0-only"}
    assert card.Terms("Apache-2.0").front == {"license": "apache-2.0"} and card.Terms().front == {"license": "unknown"}


def test_figures_stand_beside_teacher_and_control_where_one_judge_saw_all(tmp_path, monkeypatch):
    """Weights judged by the same judge, one by another, which is left out."""
    case = folders.CASES["dit"]
    for stage in ("pre", "mid", "post"):
        folders.finished(tmp_path, case._replace(stage=stage, keys={}))
    work = workspace.Workspace(loading.load(str(tmp_path / "small.yaml")), tmp_path / "run", reading=True)
    for stage, seed in (("pre", 7), ("mid", 7), ("post", 8)):
        ema = checkpoint.latest(tmp_path / "run" / stage).manifest["files"]["ema-0.safetensors"]["xxh3_128"]
        key = {"ema": ema, "eval": {"n": 4000, "seed": seed}, "extractor": "features"}
        found = {"key": key, "few": {"1": {"frechet": float(seed)}}, "solver": {"16": {"frechet": 1.5}}}
        (tmp_path / "run" / stage / "figures.json").write_text(json.dumps(found))
    export = exporting.collect(work, "mid")
    page = card.markdown(work, "mid", export.about, card.Terms(), diffusers_folder.described(export))
    assert "| this (mid) | 1, few-step | 7 |" in page and "| teacher (pre) | 16, ODE solver | 1.5 |" in page
    assert "All rows have the same judge" in page and "floor" not in page
    real = SimpleNamespace(about={"floor": {"4000": {"frechet": 0.125, "unseen": {"frechet": 9}}}}, sharpness=0.258)
    monkeypatch.setattr(judging.kept, "read", lambda folder, key: real if key["extractor"] == "features" else None)
    page = card.markdown(work, "mid", export.about, card.Terms(), diffusers_folder.described(export))
    assert "| real rows, again (floor) |  | 0.125 |\n| this (mid) |" in page and "is 0.258 of real rows" in page
    other = exporting.collect(work, "post")
    page = card.markdown(work, "post", other.about, card.Terms(), diffusers_folder.described(other))
    assert "| this (post) | 1, few-step | 8 |" in page and "teacher (" not in page and "same judge" not in page


TIMES = {
    "dit": "| 2 | 80, 0.821 |",
    "dit-jumps": "| 2 | 1 -> 0.5 -> 0 |",
    "edm2-guided": "dpmpp of order 2, from 80 to 0.002, each a constant factor below the last",
}


@pytest.mark.parametrize("name, times", TIMES.items())
def test_the_card_has_the_times_of_its_path(tmp_path, name, times):
    stage = folders.finished(tmp_path, folders.CASES[name])
    work, stage = workspace.open_stage(stage)
    export = exporting.collect(work, stage)
    page = card.markdown(work, stage, export.about, card.Terms(), diffusers_folder.described(export)).replace("\\", "")
    assert times in page and ("0.821" in page.partition("## Limits")[0]) == (name == "dit")
    assert 'from_pretrained("."' in page and "batch_size" not in page.partition("## Figures")[0]
