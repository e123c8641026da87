"""Keys under other names, at other places, in other forms: each answered with the right one, and nothing set."""

from __future__ import annotations

import pytest

from cmt_fast.config import describe, loading, overrides, synonyms
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("lr=1e-3", "did you mean post.lr or features.lr? (pre, mid, post, control each have their own)"),
        ("ema=0.999", "did you mean post.ema=[{kind: constant, beta: 0.999}]?"),
        ("teacher=pre", "did you mean post.teacher?"),
        ("q=4", "did you mean post.objective.q?"),
        ("fraction=0.5", "did you mean post.anchor.fraction?"),
        ("post.q=4", "did you mean post.objective.q?"),
        ("post.LR=1e-3", "did you mean post.lr?"),
        ("data.path=x", "it is a key of kind npz or latents"),
        ("batch_size=32", "did you mean post.batch?"),
        ("post.batch-size=32", "did you mean post.batch?"),
        ("epochs=3", "did you mean post.images_nimg (epochs x rows) or features.epochs?"),
        ("mid.steps=3", "did you mean mid.images_nimg (steps x batch)?"),
        ("max_steps=3", "did you mean post.images_nimg (steps x batch)?"),
        ("kimg=200", "did you mean post.images_nimg (1000 a kimg)?"),
        ("learning_rate=1e-3", "did you mean post.lr?"),
        ("num_classes=10", "did you mean data.expects.classes?"),
        ("fp16=true", "did you mean post.precision=fp16?"),
        ("amp=true", "did you mean post.precision=bf16?"),
        ("mid.ema_decay=0.999", "did you mean mid.ema=[{kind: constant, beta: 0.999}]?"),
        ("resume=runs/mine", "here it is --out RUN with the same command again"),  # facebookresearch/DiT#35
        ("cfg_scale=2", "sampler.guidance"),
        ("class_cond=True", "did you mean model.conditional"),  # JuliaWolleb/diffusion-anomaly#10
        ("image_size=64", "`cmt data encode --size`"),
        ("gpus=8", "torchrun"),
        ("post.lrr=1", "valid are objective, images_nimg"),
    ],
)
def test_a_key_of_elsewhere_is_answered_with_ours(typed, meant):
    with pytest.raises(ConfigError) as caught:
        loading.load("digits", [typed])
    assert "unknown key" in str(caught.value) and meant in str(caught.value)


@pytest.mark.parametrize(
    "typed, meant",
    [
        (["post.lr:1e-3"], "did you mean post.lr=1e-3, in one word?"),
        (["post.lr:", "1e-3"], "did you mean post.lr=1e-3, in one word?"),
        (["post.lr", "=", "1e-3"], "did you mean post.lr=1e-3, in one word?"),
        (["post.lr", "=1e-3"], "did you mean post.lr=1e-3, in one word?"),
        (
            ["post.lr=", "1e-3"],
            "did you mean post.lr=1e-3, in one word?",
        ),  # NVlabs/stylegan3#129: `--outdir= /home/...`
        (
            ["post.lr", "1e-3"],
            "did you mean post.lr=1e-3, in one word?",
        ),  # NVIDIA/Model-Optimizer#1082: dropped in silence
        (["lr"], "did you mean post.lr or features.lr?"),
        (["post"], "'post' is not of the form a.b=value"),
        (["=3"], "'=3' is not of the form a.b=value"),
    ],
)
def test_another_form_of_an_override_is_told(typed, meant):
    with pytest.raises(ConfigError) as caught:
        loading.load("digits", typed)
    assert str(caught.value).startswith("override: ") and meant in str(caught.value)


def test_an_override_sets_its_key_alone():
    tree = {"post": {"lr": "1"}}
    assert overrides.apply(tree, ["post.lr=2", " seed =3"]) == [] and tree == {"post": {"lr": "2"}, "seed": "3"}


def test_every_target_of_a_synonym_is_a_key_and_every_word_stands_once():
    names = {k.name for k in describe.every()}
    for target, words in synonyms.OTHERS.items():
        if synonyms.KEY.match(target):
            first = target.partition(" ")[0].partition("=")[0]
            assert first in names, target
        for word in words.split():
            assert synonyms.plain(word) == word and synonyms.HERE[word] == target, word
    top = {n.partition(".")[0] for n in names} | set(STAGES)
    assert not top & set(synonyms.HERE) - {"features"}


@pytest.mark.parametrize(
    "asked, names",
    [
        ("post.lr", ["STAGE.lr"]),
        ("lr", ["STAGE.lr", "features.lr"]),
        ("post.anchor.fraction", ["STAGE.anchor.fraction"]),
        ("anchor.fraction", ["STAGE.anchor.fraction"]),
    ],
)
def test_keys_are_narrowed(asked, names):
    from cmt_fast.cli import keys

    assert [k.name for k in keys.chosen(asked)] == names


def test_every_key_has_a_type_a_default_and_a_sentence():
    for key in describe.every():
        assert key.takes and key.default and key.text, key.name
    by_name = {(k.name, k.kind): k for k in describe.every()}
    assert by_name["STAGE.images_nimg", ""].unit == "images" and by_name["timeout_s", ""].unit == "seconds"
    assert by_name["STAGE.objective.q", "ect"].default == "64.0" and ("STAGE.objective.q", "flow") not in by_name
    assert by_name["model.patch", "dit"].takes == "integer ≥ 1" and by_name["STAGE.batch", ""].default == "128"
    kinds = by_name["STAGE.objective.kind", ""].takes.split(", ")
    consistency = ["ect", "ecd", "sct", "scd"]
    maps = ["meanflow", "imeanflow", "ayf", "lagrangian", "semigroup", "shortcut", "alphaflow"]
    assert sorted(kinds) == sorted(["denoise", "flow", "cmt_cm", "cmt_mf", *consistency, *maps, "imm", "drift"])


def test_a_key_names_the_recipes_that_set_it():
    key = next(k for k in describe.every() if k.name == "STAGE.objective.q" and k.kind == "ecd")
    found = {(s.recipe, s.name, s.value) for s in describe.users(key)}
    assert ("imagenet512-ecd", "post.objective.q", "1024") in found and all("ecd" in recipe for recipe, *_ in found)


def test_cmt_keys_prints_one_key_whole_and_all_in_a_line_each(capsys):
    from cmt_fast.cli import main

    assert main(["keys", "post.trajectories.nfe"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("post.trajectories.nfe\n  takes    integer ≥ 1 or auto [network calls], default 16\n")
    assert "set by   16: digits-mf, digits, gmm, imagenet512-dit, photos\n" in said
    assert main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(describe.every()) + 2
