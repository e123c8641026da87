"""Which project a file is of: by its tensors and its own arguments; where they leave a choice, the user is asked."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from cmt_fast import cli
from cmt_fast.config.errors import ConfigError
from cmt_fast.convert import files, names, telling
from cmt_fast.storage import checkpoint
from tests.cost.test_published import CASES, weights
from tests.fixtures import small

BY_ID = {case["id"]: case for case in CASES}
# what the training scripts of each project store, by their own defaults
SIT = {"model": "SiT-XL/2", "image_size": 256, "num_classes": 5, "path_type": "Linear", "prediction": "velocity",
       "loss_weight": None, "sample_eps": 1e-3, "train_eps": 1e-5}  # fmt: skip
DIT = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 5, "epochs": 1400, "global_batch_size": 256, "vae": "ema"}
REPA = {"model": "SiT-XL/2", "num_classes": 5, "encoder_depth": 8, "path_type": "linear", "prediction": "v",
        "cfg_prob": 0.1, "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "weighting": "uniform"}  # fmt: skip
MEANFLOW = {"model": "SiT-XL/2", "num_classes": 5, "path_type": "linear", "cfg_prob": 0.1, "time_sampler": "logit_normal",
            "ratio_r_not_equal_t": 0.75, "cfg_omega": 1.0}  # fmt: skip
LIGHTNING = {"model": {"model_type": "LightningDiT-XL/1", "use_swiglu": True, "use_rope": True}, "data": {"num_classes": 5},
             "transport": {"path_type": "Linear", "prediction": "velocity"}}  # fmt: skip


def source(state: dict, args: dict | None = None) -> files.Source:
    """A file's content, its arguments as the reader gives them."""
    about = {"args": files._plain(args or {})}
    return files.Source(Path("x.pt"), "torch", "ema", ("ema",), state, about, ())


def stripped(name: str) -> dict:
    """A case's tensors without those that its family alone has."""
    return {k: v for k, v in weights(BY_ID[name]).items() if not k.startswith("projectors.")}


@pytest.mark.parametrize(
    "state, args, family",
    [
        ("sit", SIT, "sit"),
        ("sit", DIT, "dit"),
        ("dit", SIT, "sit"),
        ("sit", REPA, "repa"),  # its projectors left out by whoever passed it on
        ("repa", None, "repa"),
        ("repa", REPA, "repa"),
        ("meanflow", None, "meanflow"),
        ("meanflow", MEANFLOW, "meanflow"),
        ("lightningdit", None, "lightningdit"),
        ("lightningdit", LIGHTNING, "lightningdit"),
        ("ditdh", None, "ditdh"),
        ("ditdh-mf", None, "ditdh"),
        ("edm2", None, "edm2"),
        ("adm", None, "edm"),
        ("ddpmpp", None, "edm"),
    ],
)
def test_a_file_says_what_it_is(state, args, family):
    assert telling.find(source(stripped(state) if args else weights(BY_ID[state]), args)).name == family


def test_a_bare_file_of_dit_or_sit_is_asked_for():
    """facebookresearch/DiT#83: the published DiT-XL-2-256x256.pt has no "ema", "opt" or "args", it is the EMA alone."""
    bare = source(weights(BY_ID["sit"]))
    with pytest.raises(ConfigError, match=r"'x.pt' could be dit or sit .*; say which with --as sit"):
        telling.find(bare)
    for name in ("dit", "sit", "repa"):
        assert telling.find(bare, name).name == name
    with pytest.raises(ConfigError, match="--as: 'sot' is not valid; .*did you mean sit"):
        telling.find(bare, "sot")


@pytest.mark.parametrize(
    "state, args, wanted, why",
    [
        ("sit", SIT, "dit", "the argument path_type Linear is sit's"),
        ("sit", DIT, "sit", "the argument model DiT-XL/2 is dit's"),
        ("sit", REPA, "sit", "the argument encoder_depth 8 is repa's"),
        ("repa", None, "sit", "the tensor projectors"),
        ("lightningdit", None, "sit", r"the tensor blocks.0.mlp.w12.weight is lightningdit's"),
        ("meanflow", MEANFLOW, "sit", "the tensor r_embedder"),
        ("ditdh-mf", None, "meanflow", "the tensor s_embedder"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(state, args, wanted, why):
    with pytest.raises(ConfigError, match=f"--as: 'x.pt' is not {wanted}: {why}") as caught:
        telling.find(source(weights(BY_ID[state]), args), wanted)
    assert "\n" not in str(caught.value)


def test_a_file_that_contradicts_itself_is_asked_for():
    both = source(weights(BY_ID["sit"]), {**SIT, "model": "DiT-XL/2"})
    with pytest.raises(
        ConfigError, match="could be sit or dit: the argument path_type Linear is sit's, but the argument model"
    ):
        telling.find(both)
    assert telling.find(both, "sit").name == "sit"
    with pytest.raises(ConfigError, match="has not the names of edm2"):
        telling.find(both, "edm2")
    hub = source({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)})
    with pytest.raises(ConfigError, match="is of no known family .*in the layout of diffusers"):
        telling.find(hub)


def test_the_recipes_path_tells_nothing(tmp_path, capsys):
    """A SiT imported with a recipe on path ve is a SiT that does not fit, and no DiT."""
    recipe = small.recipe(tmp_path, {**small.SIT, "precondition": "ddpm"})
    file, say = tmp_path / "0010000.pt", ("--recipe", str(recipe), "--out", str(tmp_path / "run"))
    torch.save(small.sit_state(), file)
    assert cli.main(["ckpt", "import", str(file), *say]) == 2
    assert "could be dit or sit" in capsys.readouterr().err
    torch.save({"ema": small.sit_state(), "args": argparse.Namespace(**{**SIT, "num_classes": 3})}, file)
    assert cli.main(["ckpt", "import", str(file), *say]) == 2
    assert "path: the file's network is for 'linear', the recipe's path is 've'" in capsys.readouterr().err
    assert cli.main(["ckpt", "import", str(file), *say, "--as", "dit"]) == 2
    assert "is not dit: the argument path_type Linear is sit's" in capsys.readouterr().err
    torch.save(small.sit_state(), file)
    assert cli.main(["ckpt", "import", str(file), *say, "--family", "dit"]) == 0
    assert "family dit" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- what a file asks for


def asks(state: dict, args: dict | None = None, name: str | None = None):
    found = source(state, args)
    return telling.find(found, name).asks(found)


def test_whether_no_label_was_trained():
    """The null class: a row more than classes (DiT and kin), never in EDM2, as the arguments say in EDM."""
    state = weights(BY_ID["sit"])
    for args, known in ((SIT, True), (DIT, True), (REPA, True), ({**MEANFLOW, "cfg_prob": 0.0}, False)):
        found = asks(weights(BY_ID["meanflow"]) if "cfg_omega" in args else state, args)
        assert (found.classes, found.null_class) == (5, known) and not found.against, args
    for case, said, known in (
        ("edm2", {}, False),
        ("adm", {}, None),
        ("adm", {"label_dim": 5}, False),
        ("adm", {"label_dim": 5, "label_dropout": 0.1}, True),
        ("ddpmpp-unconditional", {}, False),
    ):
        one = source(weights(BY_ID[case]))
        one.about["init_kwargs"] = said
        assert telling.find(one).asks(one).null_class is known, case


def test_the_rows_of_the_table_are_kept_and_none_is_made_up():
    """willisma/SiT#39: a table of 1001 rows read as one of other classes."""
    state = weights(BY_ID["sit"])
    assert torch.equal(names.sit(state)["net.label.table"], state["y_embedder.embedding_table.weight"])
    found = asks(state, {**SIT, "num_classes": 6})  # six rows, six classes: no row for no label
    assert found.classes == 6 and found.null_class is False and "none for no label" in found.against[0]
    no_labels = {k: v for k, v in state.items() if not k.startswith("y_embedder")}
    assert asks(no_labels, SIT).classes == 0


def test_other_schedules_and_lost_tables_are_against_a_file():
    state = weights(BY_ID["dit"])
    assert "trained with 100, not 1000" in asks(state, {**DIT, "diffusion_steps": 100}).against[0]
    assert "prediction 'score'" in asks(state, {**SIT, "prediction": "score"}).against[0]
    lost = {k: v for k, v in weights(BY_ID["lightningdit"]).items() if not k.startswith("feat_rope")}
    assert asks(lost, None).model["rope"] is False  # where the recipe turns queries, that is a conflict
    assert "its tables are missing" in asks(lost, LIGHTNING).against[0]


def test_heads_and_scale_where_a_file_tells_them():
    assert asks(weights(BY_ID["lightningdit-qk_norm"])).model["heads"] == 3
    assert asks(weights(BY_ID["sit"]), SIT).model["heads"] is None
    own = {**LIGHTNING, "data": {"latent_norm": True, "latent_multiplier": 2.0}}
    assert asks(weights(BY_ID["lightningdit"]), own).standard == 2
    plain = {**LIGHTNING, "data": {"latent_norm": False, "latent_multiplier": 0.18215}}
    assert asks(weights(BY_ID["lightningdit"]), plain).affine == ([0.18215], [0.0])


def test_the_first_files_of_repa():
    """Blocks behind the projectors were called decoder_blocks and counted anew."""
    state = weights(BY_ID["repa"])
    old = {k.replace("blocks.1.", "decoder_blocks.0."): v for k, v in state.items()}
    assert any("decoder_blocks" in k for k in old)
    new, legacy = names.repa(state), names.repa(old)
    assert new.keys() == legacy.keys() and all(torch.equal(new[k], legacy[k]) for k in new)
    assert asks(old).model["depth"] == 2 and telling.find(source(old)).name == "repa"


def test_the_manifest_says_whether_no_label_was_trained(tmp_path, capsys):
    small.edm2(tmp_path / "net.pkl")
    recipe = small.recipe(tmp_path, small.EDM2)
    assert (
        cli.main(["ckpt", "import", str(tmp_path / "net.pkl"), "--recipe", str(recipe), "--out", str(tmp_path / "a")])
        == 0
    )
    assert checkpoint.complete(tmp_path / "a" / "pre").manifest["parent"]["null_class"] is False
    recipe = small.recipe(tmp_path, small.SIT, "linear", name="flow")
    torch.save(small.sit_state(), tmp_path / "net.pt")
    say = [
        "ckpt",
        "import",
        str(tmp_path / "net.pt"),
        "--as",
        "sit",
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "b"),
    ]
    assert cli.main(say) == 0
    assert checkpoint.complete(tmp_path / "b" / "pre").manifest["parent"]["null_class"] is True
    # out and in again: the file of ours says it too
    assert cli.main(["ckpt", "export", str(tmp_path / "b" / "pre"), str(tmp_path / "own.safetensors")]) == 0
    say = ["ckpt", "import", str(tmp_path / "own.safetensors"), "--recipe", str(recipe), "--out", str(tmp_path / "c")]
    assert cli.main(say) == 0, capsys.readouterr().err
    parent = checkpoint.complete(tmp_path / "c" / "pre").manifest["parent"]
    assert parent["null_class"] is True and parent["parent"]["parent"]["null_class"] is True
