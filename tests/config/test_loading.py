"""The schema: recipes are valid, a round trip changes nothing, YAML's traps are closed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_fast.config import fingerprint, loading, recipes, renames
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace

DIGESTS = {
    "digits": "d913cee40214e19f",
    "digits-mf": "57fbbab55359933c",
    "cifar10": "9ef4c61c4737ed9e",
    "imagenet512-dit": "89aadb96079244e1",
}
# settings as they were there, of recipes that have others: clips are of the mean over a row's numbers, and none was augmented
SINCE = {
    "imagenet512-dit": [f"{stage}.grad_clip_norm=1" for stage in ("pre", "mid", "post")],
    "cifar10": ["pre.augment=null"],
}


@pytest.mark.parametrize(
    "recipe, ancestors",
    [
        ("digits", {"pre": [], "mid": ["pre"], "post": ["pre", "mid"], "control": ["pre"]}),
        ("imagenet256-mf", {"mid": [], "post": ["mid"], "control": []}),  # its teacher is of another run, it has no pre
    ],
)
def test_a_run_knows_its_stages_and_what_each_grew_from(recipe, ancestors):
    run = loading.load(recipe)
    assert list(run.stages) == list(ancestors) and all(run.stages[name] is getattr(run, name) for name in ancestors)
    assert {name: run.ancestors(name) for name in run.stages} == ancestors
    with pytest.raises(KeyError):
        run.ancestors("mind")


@pytest.mark.parametrize("name", recipes.recipes())
def test_recipes_are_named_by_their_files_and_say_what_they_are(name):
    assert loading.load(name).name == name
    first = recipes.recipe_text(name).splitlines()[0]
    assert first.startswith("# ") and 30 < len(first) < 160


@pytest.mark.parametrize("name", ["digits", "digits-mf", "photos", "gmm"])
def test_our_own_recipes_are_complete_and_valid(name, tmp_path):
    run = loading.load(name)
    Workspace(run, tmp_path)
    assert run.control is not None
    own = run.mid.images_nimg + run.post.images_nimg
    assert run.control.images_nimg == own, "the control gets as many student images as mid and post together"
    assert run.control.start == "pre" and run.control.anchor is None


@pytest.mark.parametrize("name", recipes.recipes())
def test_round_trip(name):
    run = loading.load(name)
    again = loading.build(loading.dump(run))
    assert again == run and fingerprint.digest(again) == fingerprint.digest(run)


def test_digest_sees_every_change_but_the_device():
    base = fingerprint.digest(loading.load("digits"))
    assert fingerprint.digest(loading.load("digits", ["device=cpu"])) == base
    assert fingerprint.digest(loading.load("digits", ["post.lr=1e-5"])) != base


@pytest.mark.parametrize("text, want", [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2e3", 2000.0), ("3", 3.0), (".5", 0.5)])
def test_numbers_are_numbers(text, want):
    run = loading.load("digits", [f"post.lr={text}"])
    assert run.post.lr == want and isinstance(run.post.lr, float)


def test_overrides_reach_into_lists_and_new_keys():
    run = loading.load("digits", ["pre.ema=[{kind: power, sigma_rel: 0.1}]", "sampler.guidance=2"])
    assert run.pre.ema[0].sigma_rel == 0.1 and run.sampler.guidance == 2.0


def test_billion_laughs_and_tags_are_refused():
    with pytest.raises(ConfigError):
        loading.parse_yaml("a: !!python/name:os.system", "x")
    with pytest.raises(ConfigError):
        loading.parse_yaml("{[1]: 2}", "x")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_override_is_a_run_or_one_line(text):
    try:
        loading.load("digits", [text])
    except ConfigError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["seed", "pre.lr", "post.batch", "mid.objective", "model.size", "sampler.mid_times", "eval.steps", "pre.ema"]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_a_run_or_one_line(key, value):
    tree = loading.parse_yaml(recipes.recipe_text("digits"), "digits")
    node = tree
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    try:
        run = loading.build(tree)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert loading.build(loading.dump(run)) == run


def test_a_renamed_key_is_read_and_says_its_new_name(tmp_path, capsys):
    text = recipes.recipe_text("digits")
    old = tmp_path / "old.yaml"
    old.write_text(text.replace("fraction:", "share:").replace("\nmid:\n", "\nmid:\n  clip: 0.5\n"))
    assert "share: 0.75" in old.read_text()
    run = loading.load(str(old))
    assert run.post.anchor.fraction == 0.75 and run.mid.grad_clip_norm == 0.5
    said = capsys.readouterr().err
    assert "note: mid.clip is now mid.grad_clip_norm" in said
    assert "note: post.anchor.share is now post.anchor.fraction" in said
    assert loading.build(loading.dump(run)) == run and not capsys.readouterr().err
    old.write_text(old.read_text().replace("  clip: 0.5\n", "  clip: 0.5\n  grad_clip_norm: 1\n"))
    with pytest.raises(ConfigError, match="mid.clip: is now mid.grad_clip_norm, and both are given"):
        loading.load(str(old))


def test_an_override_wins_under_either_name(tmp_path, capsys):
    old = tmp_path / "old.yaml"
    old.write_text(recipes.recipe_text("digits").replace("\nmid:\n", "\nmid:\n  clip: 0.5\n"))
    assert loading.load(str(old), ["mid.grad_clip_norm=1"]).mid.grad_clip_norm == 1
    assert loading.load("cifar10", ["mid.clip=2"]).mid.grad_clip_norm == 2  # the recipe has it under today's name
    assert "note: mid.clip is now mid.grad_clip_norm" in capsys.readouterr().err
    run = loading.load("digits", ["post.anchor={objective: {kind: cmt_cm}, share: 0.25}"])
    assert run.post.anchor.fraction == 0.25
    assert "note: post.anchor.share is now post.anchor.fraction" in capsys.readouterr().err


def test_a_key_that_came_later_is_in_a_digest_only_when_it_says_something(monkeypatch):
    """`seed` and `label_dropout` stand for keys that an older version did not know."""
    run, mine = loading.load("digits"), loading.load("digits", ["seed=3", "post.label_dropout=0.1"])
    with_all = fingerprint.digest(run)
    monkeypatch.setattr(renames, "ADDED", {"seed": 0, "stage.label_dropout": 0.0, "data.kind": "npz"})
    assert fingerprint.digest(run) != with_all  # both are left out
    tree = {k: v for k, v in loading.dump(run).items() if k != "seed"}
    for name in ("pre", "mid", "post", "control"):
        del tree[name]["label_dropout"]
    assert renames.first_names(loading.dump(run)) == renames.first_names(tree)
    assert renames.first_names(loading.dump(mine))["seed"] == 3
    assert renames.first_names(loading.dump(mine))["post"]["label_dropout"] == 0.1


def test_a_rename_changes_no_digest():
    """Digests of commit b68e86b, whose keys were `clip` and `anchor.share`, and which had no `eval.labels`."""
    digest = lambda name: fingerprint.digest(loading.load(name, ["eval.labels=data", *SINCE.get(name, [])]))[:16]
    assert {name: digest(name) for name in DIGESTS} == DIGESTS


@pytest.mark.parametrize(
    "override, key",
    [
        ("mid.trajectories.t_min=90", "mid.trajectories.t_min"),
        ("mid.trajectories.pool_steps=7 mid.batch=7", "mid.batch"),
        ("sampler.t_min=90", "sampler.t_min"),
        ("mid.lrr=1", "mid.lrr"),
        ("mid.teacher=pst", "mid.teacher"),
        ("post.anchor.fraction=2", "post.anchor.fraction"),
    ],
)
def test_an_error_carries_the_key_that_it_is_about(override, key, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Workspace(loading.load("digits", override.split()), tmp_path)
    assert caught.value.key == key and str(caught.value) == f"{key}: {caught.value.reason}"


@pytest.mark.parametrize(
    "override, said",
    [
        ("pre.ema=[{kind: power, sigma_rel: 9}]", "pre.ema.0.sigma_rel: 9 is not valid"),
        ("pre.ema=[{kind: power, sigma_rel: 0.1, bta: 1}]", "pre.ema.0.bta: unknown key; valid are sigma_rel, kind"),
        ("post.anchor.objective.c=-1", "post.anchor.objective.c: -1 is not valid"),
    ],
)
def test_a_key_in_a_message_is_without_tags(override, said):
    with pytest.raises(ConfigError) as caught:
        loading.load("digits", [override])
    assert str(caught.value).startswith(said)


def test_a_key_with_the_name_of_a_tag_is_named():
    """`power` tags an EMA; as a key of another part it is a key."""
    assert loading._key(("pre", "ema", 0, "power", "sigma_rel")) == "pre.ema.0.sigma_rel"
    assert loading._key(("pre", "objective", "denoise", "power")) == "pre.objective.power"


def test_another_kind_says_what_it_goes_on_with(capsys):
    """Numbers that a recipe chose for one objective are not another's without a word: at p = 1 a semigroup's u runs off."""
    own = "; post.objective={kind: semigroup} takes its own defaults\n"
    assert loading.load("digits-mf", ["post.objective.kind=semigroup"]).post.objective.p == 1
    said = "note: post.objective.kind: semigroup goes on with p 1.0 of the recipe's meanflow" + own
    assert capsys.readouterr().err == said
    for quiet in (
        ["post.objective.kind=semigroup", "post.objective.p=1"],
        ["post.objective={kind: semigroup}", "post.objective.kind=semigroup"],
        ["post.objective.kind=meanflow"],
    ):
        loading.load("digits-mf", quiet)
        assert capsys.readouterr().err == ""
    with pytest.raises(
        ConfigError, match="post.objective.kind: imm has no mean, std, ratio, p, c, which the recipe sets for"
    ):
        loading.load("digits-mf", ["post.objective.kind=imm"])
    with pytest.raises(ConfigError, match="data.kind: npz .*; data={kind: npz} takes"):
        loading.load("gmm", ["data.kind=npz"])
