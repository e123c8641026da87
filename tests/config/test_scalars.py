"""What a word means: by its key's type, as the user means it, or refused in one line. Expected values are written by hand."""

from __future__ import annotations

import time
from functools import reduce
from typing import Literal

import pytest

from cmt_fast.config import loading, recipes, scalars
from cmt_fast.config.errors import ConfigError

HOME = "/home/of/a/test"


def at(run, key: str):
    """The value at a dotted key of a run."""
    return reduce(lambda part, name: getattr(part, name), key.split("."), run)


@pytest.mark.parametrize(
    "override, want",
    [
        ("seed=0", 0),
        ("seed=1_000", 1000),
        ("seed=0x10", 16),
        ("seed=0o10", 8),
        ("seed=07", 7),  # 7 in either reading
        ("seed= 3 ", 3),
        ("seed=+3", 3),
        ("post.images_nimg=1e5", 100_000),
        ("post.images_nimg=2.56e7", 25_600_000),
        ("post.batch=64.0", 64),
        ("post.lr=1e-3", 0.001),  # huggingface/trl#1450, hiyouga/LlamaFactory#4014: text in YAML 1.1
        ("post.lr=2e-5", 2e-5),
        ("post.lr=.5", 0.5),
        ("post.lr=1.", 1.0),
        (
            "post.betas=[0, 0.99]",
            (0.0, 0.99),
        ),  # NVlabs/stylegan3#656: a whole number among floats stopped the optimizer
        ("post.betas=0,0.99", (0.0, 0.99)),
        ("eval.steps=1,2,4", (1, 2, 4)),
        ("eval.steps=4", (4,)),
        ("eval.steps=[1, 2]", (1, 2)),
        ("post.compile=yes", True),
        ("post.compile=off", False),
        ("post.compile=TRUE", True),
        ("post.cuda_graph=no", False),
        ("post.cuda_graph=auto", "auto"),
        ("zero_stage=2", 2),
        ("post.micro_batch=None", None),
        ("post.micro_batch=~", None),
        ("control=null", None),
        ("eval.reference=null", None),
        ("eval.reference='null'", "null"),
        ("name=no", "no"),  # Norway
        ("name=010", "010"),
        ("name=1e3", "1e3"),
        ("name=1.10", "1.10"),
        ("name=12:30", "12:30"),
        ("name=2024-01-01", "2024-01-01"),
        ("name=true", "true"),
        ("eval.reference=data/my #1 set.npz", "data/my #1 set.npz"),
        ("eval.reference=a: b.npz", "a: b.npz"),
        ("eval.reference=[a] b", ConfigError),
        ("eval.reference='[a] b'", "[a] b"),
        ("eval.reference=*x&y!z%", "*x&y!z%"),
        ("eval.reference=a=b.npz", "a=b.npz"),
        ("eval.reference= 'a b' ", "a b"),
        ("eval.reference=~/x.npz", f"{HOME}/x.npz"),
        ("eval.reference=größe/人.npz", "größe/人.npz"),
    ],
)
def test_a_word_is_read_as_its_key_says(override, want, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    if want is ConfigError:
        with pytest.raises(ConfigError, match="not valid YAML"):
            loading.load("digits", [override])
        return
    found = at(loading.load("digits", [override]), override.partition("=")[0])
    assert found == want and type(found) is type(want)


@pytest.mark.parametrize(
    "override, said",
    [
        ("seed=010", "seed: '010' begins with 0: YAML and C read it as octal, 8, others as 10; write 8 or 10"),
        ("seed=08", "seed: '08' begins with 0; write 8"),
        ("post.lr=010", "post.lr: '010' begins with 0"),
        ("eval.steps=1,010", "eval.steps.1: '010' begins with 0"),
        ("seed=1:30", "seed: '1:30' is no number here (YAML 1.1 reads it to the base 60)"),
        ("post.images_nimg=200k", "post.images_nimg: '200k' is no number; write 200e3"),
        ("post.images_nimg=12.8M", "post.images_nimg: '12.8M' is no number; write 12.8e6"),
        ("post.images_nimg=1e-3", 'post.images_nimg: "1e-3" is not valid; input should be a valid integer'),
        ("seed=1e400", 'seed: "1e400" is not valid'),
        ("post.lr=1e400", "post.lr: Infinity is not valid; input should be a finite number"),
        ("post.lr=nan", "post.lr: NaN is not valid; input should be a finite number"),
        ("post.lr=-inf", "post.lr: -Infinity is not valid"),
        ("post.lr=\u22121e-3", "post.lr: '\u22121e-3' has characters that are no ASCII; did you mean -1e-3?"),
        ("post.lr=1e\u20133", "post.lr: '1e\u20133' has characters that are no ASCII; did you mean 1e-3?"),
        ("post.lr=\uff11e-3", "did you mean 1e-3?"),
        ("post.lr=1,5e-3", 'post.lr: "1,5e-3" is not valid; input should be a valid number'),
        ("post.lr=50%", 'post.lr: "50%" is not valid'),
        ("post.lr=", "post.lr: has no value behind =; write post.lr=null"),
        ("post.lr=null", 'post.lr: "null" is not valid'),
        ("post.compile=Norway", 'post.compile: "Norway" is not valid; input should be a valid boolean'),
        ("name=null", "name: must be given, and 'null' means empty"),
        ("name=None", "name: must be given, and 'None' means empty"),
        ("zero_stage=5", "zero_stage: '5' is not valid; valid are auto, 0, 1, 2, 3"),
        ("post.ema=0.999", "post.ema: '0.999' is not valid; did you mean post.ema=[{kind: constant, beta: 0.999}]?"),
        ("post.ema.beta=0.99", "set all of it, as post.ema=[{kind: constant, beta: 0.99}]"),
        ("mid.objective=cmt_cm", "mid.objective: 'cmt_cm' is not valid; write mid.objective.kind=cmt_cm"),
        ("model=dit", "model: 'dit' is not valid; write model.kind=dit"),
        ("post.anchor=0.5", "post.anchor: '0.5' is not valid; it needs a mapping; `cmt keys post.anchor`"),
        ("data={kind: npz, path: my #1.npz}", "override data: line 1 is not valid YAML"),
        ("model.dropout=1.0", "model.dropout: unknown key; it is a key of kind edm2 or edm"),
    ],
)
def test_what_has_two_readings_or_none_is_refused_in_one_line(override, said):
    with pytest.raises(ConfigError) as caught:
        loading.load("digits", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_dropout_of_1_is_refused():
    """GabrielNobis/gfdm#2: a default of 1.0 trained networks that saw nothing."""
    with pytest.raises(ConfigError, match="model.dropout: 1.0 is not valid; input should be less than 1"):
        loading.load("cifar10", ["model.dropout=1.0"])


def test_a_file_is_read_by_the_same_rule(tmp_path):
    """yaml/pyyaml#107: 02142 became 1122; here a number of two readings is refused, and text stays text."""
    file = tmp_path / "mine.yaml"
    text = recipes.recipe_text("digits").replace("name: digits", "name: 02142") + "seed: 1_000\ntensorboard: on\n"
    file.write_text(text.replace("batch: 64", "batch: 6.4e1"))
    run = loading.load(str(file))
    assert (run.name, run.seed, run.tensorboard, run.post.batch) == ("02142", 1000, True, 64)
    file.write_text(text.replace("seed: 1_000", "seed: 02142"))
    with pytest.raises(ConfigError, match="seed: '02142' begins with 0: .* octal, 1122, others as 2142"):
        loading.load(str(file))


def test_a_file_of_another_system_is_the_same_recipe(tmp_path):
    """A mark of byte order, line ends of Windows, comments; a tab is refused by its name in test_bad_input.py."""
    file = tmp_path / "mine.yaml"
    text = recipes.recipe_text("digits").replace("path: ve", "path:  ve  # a comment")
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert loading.load(str(file)) == loading.load("digits")


def test_a_choice_between_a_list_and_a_word():
    hint = tuple[int, ...] | Literal["stored"] | None
    read = lambda text: scalars.typed(scalars.value(text, "k"), hint, "k")
    assert [read(t) for t in ("5,17,402", "5", "stored", "null", "[1, 2]")] == [
        [5, 17, 402],
        [5],
        "stored",
        None,
        [1, 2],
    ]


def test_a_run_s_own_file_is_a_recipe(tmp_path):
    import json

    run = loading.load("digits", ["seed=3", "eval.steps=1"])
    (tmp_path / "run.json").write_text(json.dumps({"digest": "", "run": loading.dump(run), "rows": {}}))
    assert loading.load(str(tmp_path / "run.json")) == run


LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 8)}]\n" for p, c in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize("text", [LAUGHS, "a: " + "[" * 80 + "]" * 80, "a: &a [*a]", "[" * 5000])
def test_aliases_that_make_a_recipe_vast_are_refused_at_once(text):
    before = time.process_time()
    with pytest.raises(ConfigError, match="without end|recursive|recursion"):
        scalars.parse(text, "x.yaml")
    assert time.process_time() - before < 2
    assert scalars.parse("a: &a [1, 2]\nb: [*a, *a]", "x.yaml")["b"] == [["1", "2"]] * 2
