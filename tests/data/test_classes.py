"""Classes are what the labels say: gapped numbers become dense and stay known, another network's table is mapped to."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Latents, Npz
from cmt_fast.config.schema.data import Expected
from cmt_fast.data import classes, datasets, latents, opening, shards
from cmt_fast.data.importing import Settings, convert
from cmt_fast.data.order import Loader
from cmt_fast.data.writing import Layout, Writer
from cmt_fast.diffusion.labels import Some
from cmt_fast.run.absent import AbsentRows
from cmt_fast.run.networks import rows_of
from tests.fixtures.hostile_stores import npy

NUMBERS = [5, 402, 17, 17, 5, 17]
DENSE = [0, 2, 1, 1, 0, 1]


def written(out, labels, names=(), flips=False):
    """A store of a row for each label."""
    writer, n = Writer(out), len(labels)
    writer.start()
    rows = np.random.default_rng(0).normal(size=(n, 4, 2, 2)).astype("float32")
    layout = Layout("mean", "float32", (4, 2, 2))
    with writer.shard(0, layout, "k") as into:
        into.add(rows, list(labels), "test")
    about = {"vae": "", "vae_xxh3_128": "", "crop": "", "source": "random"}
    writer.finish(layout, ["k"], {"flips": flips, "class_names": names, **about})
    return opening.opened(out)


def old(out, labels):
    """A store whose table of classes reaches to the largest label, as an index without `class_ids` has it."""
    store = written(out, labels, [str(k) for k in range(max(labels) + 1)])
    body = json.loads((out / latents.INDEX).read_text())
    assert "class_ids" not in body
    body["class_names"] = []
    del body["xxh3_128"]
    latents.write_index(out, body)
    return opening.opened(out) if store else store


def images(n):
    """n images of one channel."""
    return np.random.default_rng(1).integers(256, size=(n, 1, 4, 4)).astype(np.uint8)


def npz(path, labels, n=None):
    np.savez(path, images=images(n or len(labels)), labels=labels)
    return Npz(str(path))


# ------------------------------------------------------------------------------------------------ what becomes dense


def test_gapped_labels_of_a_new_store_are_dense_and_keep_their_numbers(tmp_path):
    s = written(tmp_path / "s", NUMBERS)
    assert (s.classes, s.labels.tolist(), s.index.class_ids) == (3, DENSE, (5, 17, 402))
    assert classes.line(s) == "classes: 3 (5, 17, 402), 1 to 3 rows each; unbalanced 3:1" and not classes.gaps(s)
    shards.export(s, tmp_path / "tar", 4, 0, lambda *_: None)
    t = opening.opened(tmp_path / "tar")
    assert t.index.class_ids == (5, 17, 402) and sorted(t.labels.tolist()) == sorted(DENSE)


def test_labels_without_gaps_and_named_tables_stay_what_they_are(tmp_path):
    plain = written(tmp_path / "plain", [2, 0, 1, 1])
    assert plain.labels.tolist() == [2, 0, 1, 1] and plain.index.class_ids == ()
    assert "class_ids" not in json.loads((tmp_path / "plain" / latents.INDEX).read_text())
    named = written(tmp_path / "named", [0, 2, 2], ["cat", "dog", "eel"])
    assert named.classes == 3 and named.labels.tolist() == [0, 2, 2]
    assert (
        classes.line(named)
        == "classes: 2 of the network's 3 (cat, eel), 1 to 2 rows each; unbalanced 2:1; without rows: dog"
    )


def test_dataset_json_from_one_on_is_taken(tmp_path):
    """NVlabs/stylegan2-ada-pytorch#126: labels 1 and 2; the reporter was told to try 0 and 1 instead."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for k in range(4):
            file.writestr(f"{k}.npy", npy(np.full((8, 2, 2), k + 1, np.float32)))
        file.writestr("dataset.json", json.dumps({"labels": [[f"{k}.npy", 1 + k % 2] for k in range(4)]}))
    index = convert(tmp_path / "in.zip", tmp_path / "out", Settings("edm2", "float32"), shard_rows=2)
    s = opening.opened(tmp_path / "out")
    assert (index.classes, index.class_ids, s.labels.tolist()) == (2, (1, 2), [0, 1, 0, 1])


@pytest.mark.parametrize("label", [[1.0, 0.0], 1.5, "cat", -1, True, None])
def test_dataset_json_of_other_than_class_numbers_is_one_line(tmp_path, label):
    """NVlabs/stylegan3#149: two continuous features in the place of a class."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for k in range(2):
            file.writestr(f"{k}.npy", npy(np.full((8, 2, 2), k + 1, np.float32)))
        file.writestr("dataset.json", json.dumps({"labels": [["0.npy", 0], ["1.npy", label]]}))
    with pytest.raises(ValueError, match=r"'dataset.json': .* is no class number, a whole number from 0 to 1048575"):
        convert(tmp_path / "in.zip", tmp_path / "out", Settings("edm2", "float32"), shard_rows=2)


def test_npz_labels_are_dense_and_a_run_on_record_keeps_its_table(tmp_path):
    config = npz(tmp_path / "x.npz", np.array(NUMBERS))
    d = datasets.load(config)
    assert (d.classes, d.labels.tolist(), d.class_ids) == (3, DENSE, (5, 17, 402))
    assert rows_of(d)["class_ids"] == [5, 17, 402]
    begun = datasets.load(config, 403)  # classes of the run's network, as run.json has them
    assert (begun.classes, begun.labels.tolist(), begun.class_ids) == (403, NUMBERS, ())
    assert begun.facts == d.facts and "class_ids" not in rows_of(begun)
    assert datasets.load(config, 3).labels.tolist() == DENSE
    assert datasets.load(npz(tmp_path / "y.npz", np.array([2, 0, 1])), 3).labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.array([0, -1, 2]), ["-1", "0 to 1048575"]),
        (np.array([0, 1, 1 << 30]), ["1073741824"]),
        (np.array([0.0, 1.0, 2.0]), ["float64", "astype"]),
        (np.eye(3)[[0, 2, 1]], ["one-hot", "argmax(1)"]),
        (np.array(["cat", "dog", "cat"]), ["text", "np.unique"]),
        (np.array([[0], [1], [2]]), ["(3, 1)", "labels[:, 0]"]),
        (np.array([0, 1]), ["(2,) for 3 images"]),
        (np.array([True, False, True]), ["bool"]),
    ],
)
def test_npz_labels_that_are_no_class_numbers_are_one_line(tmp_path, labels, words):
    with pytest.raises(ValueError) as error:
        datasets.load(npz(tmp_path / "x.npz", labels, 3))
    said = str(error.value)
    assert said.startswith("data.path: labels of") and "\n" not in said and all(w in said for w in words), said


# ------------------------------------------------------------------------------------------------ stores of before


def test_a_store_of_before_loads_with_equal_rows_and_digests(tmp_path):
    s, new = old(tmp_path / "old", NUMBERS), written(tmp_path / "new", NUMBERS)
    assert (s.classes, s.labels.tolist(), s.class_names, s.class_ids) == (403, NUMBERS, (), ())
    assert torch.equal(s.rows(torch.arange(6))[0], new.rows(torch.arange(6))[0])
    same = opening.load(Latents(str(tmp_path / "old")))
    assert same.facts == s.facts and same.labels.tolist() == NUMBERS
    assert classes.line(s).startswith(
        "classes: 3 of the network's 403 (5, 17, 402), 1 to 3 rows each; unbalanced 3:1; without"
    )
    assert classes.gaps(s).endswith("else data.class_ids=[0,1,2] makes them 3")
    settled = opening.load(Latents(str(tmp_path / "old"), class_ids=(0, 1, 2)))
    assert (settled.classes, settled.labels.tolist()) == (3, DENSE)
    assert classes.line(settled).startswith("classes: 3 (5, 17, 402),")


# ------------------------------------------------------------------------------------------------ another network's table


@pytest.mark.parametrize("ids", [(5, 17, 402), "stored"])
def test_labels_are_the_networks_numbers_wherever_rows_are_read(tmp_path, ids):
    """facebookresearch/DiT#100: "a mapping of my dataset classes to the pre-trained dataset classes"."""
    written(tmp_path / "s", NUMBERS)
    np.savez(tmp_path / "x.npz", images=images(6), labels=np.array(NUMBERS))
    about = {"class_ids": ids, "classes": 1000}
    for config in (Latents(str(tmp_path / "s"), **about), Npz(str(tmp_path / "x.npz"), **about)):
        d = datasets.load(config)
        assert (d.classes, d.labels.tolist()) == (1000, NUMBERS) and not d.class_ids
        assert d.rows(torch.arange(6))[1].tolist() == NUMBERS
        loader = Loader(d, 0, torch.device("cpu"), 6)
        assert sorted(loader.rows(torch.arange(6))[1].tolist()) == sorted(NUMBERS)
        loader.close()
        small = datasets.in_memory(d)
        assert small.labels.tolist() == NUMBERS and small.classes == 1000
        assert classes.drawn(d) == Some((5, 17, 402), 1000)
        assert classes.law(d, "data")(torch.arange(6)).bincount(minlength=403)[[5, 17, 402]].tolist() == [2, 3, 1]
        assert set(classes.law(d, "uniform")(torch.arange(3)).tolist()) == {5, 17, 402}
        assert classes.line(d).startswith(
            "classes: 3 of the network's 1000 (5, 17, 402), 1 to 3 rows each; unbalanced 3:1"
        )


def test_mean_and_std_of_a_recipe_do_not_lose_the_map(tmp_path):
    written(tmp_path / "s", NUMBERS)
    d = opening.load(Latents(str(tmp_path / "s"), mean=(0.0,) * 4, std=(1.0,) * 4, class_ids=(7, 8, 9), classes=10))
    assert d.labels.tolist() == [7, 9, 8, 8, 7, 8] and d.class_names[9] == "402"


@pytest.mark.parametrize(
    "names, about, words",
    [
        ((), {"classes": 1000}, ["data.classes: 1000", "has 3 classes", "data.class_ids=[5,17,402] data.classes=1000"]),
        ((), {"classes": 10}, ["data.class_ids=[...] data.classes=10", "5, 17, 402"]),
        (("cat", "dog", "eel"), {"classes": 9}, ["data.class_ids=[...] data.classes=9", "cat, dog, eel"]),
        (("cat", "dog", "eel"), {"class_ids": "stored"}, ["data.class_ids", "names alone", "cat"]),
        ((), {"class_ids": (5, 17)}, ["data.class_ids: 2 numbers for the 3 classes"]),
        ((), {"class_ids": (5, 5, 6), "classes": 9}, ["data.class_ids: 5 is there twice"]),
        ((), {"class_ids": (5, 17, 402)}, ["data.class_ids: 402", "0 to 2", "data.classes", "403 or more"]),
        ((), {"class_ids": "stored", "classes": 100}, ["data.class_ids: 402", "0 to 99"]),
        (
            (),
            {"expects": Expected((4, 2, 2), 1000)},
            ["data.expects.classes", "3 classes, not 1000", "data.class_ids=[5,17,402] data.classes=1000"],
        ),
    ],
)
def test_maps_that_cannot_be_are_one_line(tmp_path, names, about, words):
    written(tmp_path / "s", DENSE if names else NUMBERS, names)
    with pytest.raises(ValueError) as error:
        opening.load(Latents(str(tmp_path / "s"), **about))
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), error.value


def test_many_classes_are_proposed_by_a_word(tmp_path):
    """Ten numbers of a thousand: `stored` stands for them, and is what the store knows."""
    numbers = list(range(3, 33, 3))
    written(tmp_path / "s", numbers)
    with pytest.raises(
        ValueError, match=r"data.class_ids=stored data.classes=1000 \(the numbers that its source gave them\)"
    ):
        opening.load(Latents(str(tmp_path / "s"), classes=1000))
    assert opening.load(Latents(str(tmp_path / "s"), class_ids="stored", classes=1000)).labels.tolist() == numbers


def test_a_store_without_labels_is_refused_by_a_recipe_of_classes(tmp_path):
    """NVlabs/stylegan3#161: labels that were not picked up, "Dataset labels: False", and training went on."""
    s = written(tmp_path / "s", [None] * 3)
    assert s.classes == 0 and classes.line(s) == "classes: none, the rows have no labels"
    with pytest.raises(ValueError, match="has no labels, and the recipe is of 10 classes; .*data.expects.classes=0"):
        opening.load(Latents(str(tmp_path / "s"), expects=Expected((4, 2, 2), 10)))
    for about in ({"classes": 10}, {"class_ids": (1, 2)}):
        with pytest.raises(ValueError, match=f"data.{next(iter(about))}: .* has no labels"):
            opening.load(Latents(str(tmp_path / "s"), **about))
    assert opening.load(Latents(str(tmp_path / "s"), expects=Expected((4, 2, 2), 0))).n == 3


@pytest.mark.parametrize("asked, want", [("17", [1]), ("402,5", [2, 0])])
def test_classes_are_asked_for_by_the_sources_numbers(tmp_path, asked, want):
    """NVlabs/stylegan3#126: images of one class, by `--class`."""
    assert classes.by_name(written(tmp_path / "s", NUMBERS), asked) == want
    named = written(tmp_path / "n", DENSE, ("cat", "dog", "eel"))
    assert classes.by_name(named, "dog, cat") == [1, 0] and classes.by_name(named, "2") == [2]
    with pytest.raises(ConfigError, match="--class: '3' is no class with rows; there are cat, dog, eel"):
        classes.by_name(named, "3")


@pytest.mark.parametrize("asked, want", [("10", [1]), ("2,1", [2, 0])])
def test_names_that_are_numbers_are_what_a_number_asks_for(tmp_path, asked, want):
    """Folders 1, 10, 2 are classes 0, 1, 2 by the order of names: a number is a folder's, never a place in that order."""
    named = written(tmp_path / "n", DENSE, ("1", "10", "2"))
    assert classes.by_name(named, asked) == want
    with pytest.raises(ConfigError, match="--class: '0' is no class with rows; there are 1, 10, 2"):
        classes.by_name(named, "0")


def test_a_name_with_commas_is_one_class(tmp_path):
    """As ImageNet's words are: `tench, Tinca tinca`."""
    named = written(tmp_path / "n", DENSE, ("cat", "tench, Tinca tinca", "dog"))
    assert classes.by_name(named, "tench, Tinca tinca") == [1] and classes.by_name(named, "dog, cat") == [2, 0]
    assert classes.by_name(named, "dog,tench, Tinca tinca,cat") == [2, 1, 0]
    with pytest.raises(ConfigError, match="--class: 'tench' is no class with rows"):
        classes.by_name(named, "cat,tench")
    twice = written(tmp_path / "t", DENSE, ("crane", "dog", "crane"))  # ImageNet has two
    with pytest.raises(ConfigError, match="--class: 'crane' is the name of several classes; give a number of 0, 2"):
        classes.by_name(twice, "dog,crane")
    assert classes.by_name(twice, "2,dog") == [2, 1]


@pytest.mark.parametrize("own", [3, 1000, None])
def test_a_store_may_be_expected_by_its_own_classes_or_by_those_of_the_table(tmp_path, own):
    """A recipe that was written for three classes takes the keys that a teacher of a thousand asks for."""
    written(tmp_path / "s", NUMBERS)
    about = {"class_ids": (5, 17, 402), "classes": 1000, "expects": Expected((4, 2, 2), own)}
    assert opening.load(Latents(str(tmp_path / "s"), **about)).classes == 1000
    gone = AbsentRows(Latents("nowhere", **about))  # what is said of the store before it is there is the same
    assert gone.classes == gone.known["classes"] == 1000
    with pytest.raises(ConfigError, match="data.expects.classes: .* has 1000 classes, not 7"):
        opening.load(Latents(str(tmp_path / "s"), **{**about, "expects": Expected((4, 2, 2), 7)}))


@pytest.mark.parametrize(
    "own, about, words",
    [
        (3, {"class_ids": (5, 5, 6), "classes": 9}, ["data.class_ids: 5 is there twice"]),
        (3, {"class_ids": (5, 17, 402)}, ["data.class_ids: 402", "0 to 2", "403 or more"]),
        (3, {"class_ids": (1, 2, 3, 4), "classes": 9}, ["data.class_ids: 4 numbers for the 3 classes of data.expects"]),
        (3, {"classes": 9}, ["data.classes: 9", "data.expects has 3 classes", "data.class_ids="]),
        (0, {"class_ids": (1, 2), "classes": 9}, ["data.class_ids: data.expects has no labels"]),
        (0, {"classes": 9}, ["data.classes: data.expects has no labels"]),
    ],
)
def test_maps_that_cannot_be_are_told_where_the_store_is_not(own, about, words):
    with pytest.raises(ConfigError) as error:
        AbsentRows(Latents("nowhere", expects=Expected((4, 2, 2), own), **about))
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), error.value


def test_a_law_of_classes_that_nobody_has_said(tmp_path):
    """The store is not here and the recipe does not say its classes: it may well have labels."""
    gone = AbsentRows(Latents("nowhere", expects=Expected((4, 2, 2))))
    with pytest.raises(
        ConfigError, match="eval.labels: 'uniform', and data.expects has no classes; set data.expects.cl"
    ):
        classes.law(gone, "uniform")
    stored = AbsentRows(Latents("nowhere", expects=Expected((4, 2, 2)), class_ids="stored", classes=9))
    assert classes.law(stored, "uniform").text() == "uniform over 9 classes"
