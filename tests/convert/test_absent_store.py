"""A checkpoint is imported where its recipe's store is not: the run keeps what the recipe says of the rows, training compares."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cmt_fast import cli
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.convert import names
from cmt_fast.run import networks, workspace
from cmt_fast.storage import checkpoint
from tests.fixtures import small
from tests.fixtures.stores import make_store

SCALE = {"mean": [0.0] * 4, "std": [1.0] * 4, "scale": 0.18215}
EXPECTS = {"shape": [4, 8, 8], "classes": 3}


def cmt(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def sit(tmp_path, **data):
    """A bare SiT and a recipe over a store that is not there."""
    torch.save(small.sit_state(), tmp_path / "net.pt")
    recipe = small.elsewhere(tmp_path, small.SIT, "linear", **data)
    return recipe, ("ckpt", "import", tmp_path / "net.pt", "--as", "sit", "--recipe", recipe, "--out", tmp_path / "run")


def test_imported_without_its_store_and_trained_when_it_is_there(tmp_path, capsys):
    recipe, say = sit(tmp_path, expects=EXPECTS, **SCALE)
    code, out, err = cmt(capsys, *say)
    assert code == 0, err
    assert "are scaled as the network's were" in out
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["rows"] == {"shape": [4, 8, 8], "classes": 3, "normalisation": [[0.0] * 4, [1.0] * 4, 0.18215]}
    train = ("train", recipe, "--from", tmp_path / "run", "--stages", "mid", "--out", tmp_path / "more")
    code, _, err = cmt(capsys, *train)
    assert code == 2 and "is not a folder" in err
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=3)
    code, _, err = cmt(capsys, *train)
    assert code == 0, err
    parent = checkpoint.complete(tmp_path / "more" / "mid").manifest["parent"]
    assert parent["stage"] == "pre" and parent["parent"]["family"] == "sit"
    # what the run keeps is what it would keep with the data at hand
    work = workspace.Workspace(loading.load(str(recipe)), tmp_path / "none")
    assert work.rows() == about["rows"]
    # another scale in training than at the import is another network's
    code, _, err = cmt(capsys, *train[:-1], tmp_path / "other", "data.scale=0.5")
    assert code == 2 and "its normalisation is" in err


def test_rows_that_are_not_those_expected_are_refused_when_they_come(tmp_path, capsys):
    recipe, say = sit(tmp_path, expects=EXPECTS, **SCALE)
    assert cmt(capsys, *say)[0] == 0
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=2)
    code, _, err = cmt(
        capsys, "train", recipe, "--from", tmp_path / "run", "--stages", "mid", "--out", tmp_path / "more"
    )
    assert code == 2 and "data.expects.classes" in err


def test_what_the_recipe_leaves_open_is_not_made_up(tmp_path, capsys):
    """Not its normalisation; the file's classes build the network and are kept, and training compares what is known."""
    save_file({k: v.contiguous() for k, v in small.edm2_state().items()}, tmp_path / "net.pt")  # without an encoder
    recipe = small.elsewhere(tmp_path, small.EDM2, expects={"shape": [4, 8, 8]})
    code, _, err = cmt(capsys, "ckpt", "import", tmp_path / "net.pt", "--recipe", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    assert checkpoint.complete(tmp_path / "run" / "pre").tensors("ema-0")["net.label.weight"].shape[1] == 3
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert rows == {"shape": [4, 8, 8], "classes": 3}
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=3)
    code, _, err = cmt(
        capsys, "train", recipe, "--from", tmp_path / "run", "--stages", "mid", "--out", tmp_path / "more"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    "classes, hint", [(2, "say which of its 3 classes the data's are"), (0, "the data have no labels")]
)
def test_a_store_of_other_classes_than_the_file_is_refused_when_it_comes(classes, hint, tmp_path, capsys):
    recipe, say = sit(tmp_path, expects={"shape": [4, 8, 8]}, **SCALE)
    assert cmt(capsys, *say)[0] == 0
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=classes)
    train = ("train", recipe, "--from", tmp_path / "run", "--stages", "mid", "--out", tmp_path / "more")
    code, _, err = cmt(capsys, *train)
    assert code == 2 and f"its classes is 3, this run's is {classes}" in err and hint in err
    if classes:
        assert cmt(capsys, *train, "data.class_ids=[0,2]", "data.classes=3")[0] == 0


def test_a_map_to_the_files_classes_needs_no_store(tmp_path, capsys):
    """The recipe expects the store's own two classes; which of the file's three they are is asked for, and said without it."""
    recipe, say = sit(tmp_path, expects={"shape": [4, 8, 8], "classes": 2}, **SCALE)
    code, out, err = cmt(capsys, *say)
    assert (
        code == 2
        and "if the data have 2 classes, say which of its 3 they are: data.class_ids=[...] data.classes=3" in out
    )
    keys = ("data.class_ids=[0,2]", "data.classes=3")
    assert cmt(capsys, *say, *keys)[0] == 0
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=2)
    more = ("--from", tmp_path / "run", "--stages", "mid", "--out", tmp_path / "more")
    assert cmt(capsys, "train", recipe, *more, *keys)[0] == 0


def test_a_scale_that_nobody_could_compare_later_must_be_said(tmp_path, capsys):
    """A SiT sees 0.18215 x; the store's own mean and std, which the recipe would take, are not here to be looked at."""
    recipe, say = sit(tmp_path, expects=EXPECTS)
    code, _, err = cmt(capsys, *say)
    assert code == 2 and "data.mean: is missing" in err and not (tmp_path / "run").exists()
    hints = err.strip().partition("; try ")[2].split(" ")
    assert hints == ["data.mean=[0,0,0,0]", "data.std=[1,1,1,1]", "data.scale=0.18215"]
    assert cmt(capsys, *say, *hints)[0] == 0
    code, _, err = cmt(capsys, *say, "data.mean=[0,0]", "data.std=[1,1]")
    assert code == 2 and "need 4 numbers each" in err
    # with no word of what is expected there is nothing to go by
    _, say = sit(tmp_path)
    code, _, err = cmt(capsys, *say)
    assert code == 2 and "is not a folder" in err


def test_another_side_is_said_with_what_the_recipe_must_expect(tmp_path, capsys):
    """willisma/SiT#9: pos_embed of 1024 places (64 x 64 latents) where the network has 256 (32 x 32)."""
    recipe, say = sit(tmp_path, expects={"shape": [4, 16, 16], "classes": 3}, **SCALE)
    code, out, err = cmt(capsys, *say)
    assert code == 2 and "network is for 4 x 8 x 8, the data are 4 x 16 x 16" in out
    (hint,) = err.strip().partition("; try ")[2].splitlines()
    assert hint == "data.expects={shape: [4,8,8],classes: 3}"
    assert cmt(capsys, *say, hint)[0] == 0


def test_a_mismatch_is_found_before_anything_is_built_or_read(tmp_path, capsys, monkeypatch):
    """Networks are built without memory, the file is looked at by its header alone: both may be of gigabytes."""
    state = {k: v.contiguous() for k, v in small.sit_state().items()}
    state["final_layer.linear.weight"][:] = float("nan")  # reading the numbers would be told by another error
    save_file(state, tmp_path / "net.pt")
    built, seen, own = [], [], networks.fresh_network

    def watched(*arguments, **named):
        built.append(own(*arguments, **named))
        return built[-1]

    monkeypatch.setattr(networks, "fresh_network", watched)
    monkeypatch.setattr(workspace, "fresh_network", watched)
    for family in ("_transformer", "reversed_time"):
        call = getattr(names, family)
        monkeypatch.setattr(names, family, lambda theirs, call=call: seen.extend(theirs.values()) or call(theirs))
    recipe = small.elsewhere(tmp_path, {**small.SIT, "depth": 2}, "linear", expects=EXPECTS, **SCALE)
    say = ("ckpt", "import", tmp_path / "net.pt", "--as", "sit", "--recipe", recipe, "--out", tmp_path / "run")
    code, _, err = cmt(capsys, *say)
    assert code == 2 and "model.depth=1" in err and "finite" not in err
    assert built and all(p.is_meta for net in built for p in net.parameters())
    assert seen and all(x.is_meta for x in seen)
    code, _, err = cmt(capsys, *say, "model.depth=1")
    assert code == 2 and "is not finite" in err
    assert all(p.is_meta for net in built for p in net.parameters())


def test_absent_rows_give_none(tmp_path):
    from cmt_fast.run import absent

    run = loading.load(str(small.elsewhere(tmp_path, small.SIT, "linear", expects=EXPECTS)))
    rows = absent.rows(run)
    assert isinstance(rows, absent.AbsentRows) and rows.known == {"shape": [4, 8, 8], "classes": 3}
    with pytest.raises(ConfigError, match="data.path: .* is not a folder"):
        rows.rows(torch.tensor([0]))
    make_store(tmp_path / "store", 24, (4, 8, 8), classes=3)
    assert absent.rows(run).n == 24
