"""What a run remembers of itself is not believed where it was damaged; it is made anew where that is proven to be the same."""

from __future__ import annotations

import shutil

import pytest
import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import features
from cmt_fast.run.folder import RUN_FILE, about_run, stored_run
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, sound
from cmt_fast.train import loop
from tests.fixtures.tiny import metrics, tiny

SHORT = ["data={kind: gmm, n: 200}", "model={kind: mlp, width: 8, depth: 1}", "pre.images_nimg=128", "eval.n=20"]


def train(folder, *more):
    loop.train(Workspace(tiny("digits", *SHORT, *more), folder), ["pre"])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("recorded") / "run")


def test_a_damaged_run_json_is_written_anew_by_the_same_recipe(trained, tmp_path, capsys):
    """The manifests say which settings it had; under other ones it is refused, and nothing on disk changes."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / RUN_FILE).read_text()
    (run / RUN_FILE).write_text(text.replace('"batch": 32', '"batch": 33', 1))
    with pytest.raises(ConfigError, match="pre was not trained with these settings"):
        train(run, "pre.lr=0.5")
    assert sorted(p.name for p in run.glob("run.json*")) == [RUN_FILE]
    train(run)
    assert "put aside as run.json.damaged" in capsys.readouterr().err
    same = ("run", "digest", "rows", "data", "contents", "remembered")
    assert {k: about_run(run)[k] for k in same} == {k: about_run(trained)[k] for k in same}
    (run / RUN_FILE).write_bytes(b"[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        stored_run(run)


def test_a_checkpoint_of_other_settings_is_passed_over(trained, tmp_path, capsys):
    """Of the same stage and step, whole, and of another run: it was trained on as though it were this one's."""
    other, run = train(tmp_path / "other", "seed=7"), tmp_path / "run"
    shutil.copytree(trained, run)
    last = checkpoint.steps(run / "pre")[-1]
    shutil.rmtree(checkpoint.folder_of(run / "pre", last))
    shutil.copytree(checkpoint.folder_of(other / "pre", last), checkpoint.folder_of(run / "pre", last))
    train(run)
    assert "settings that this run never had" in capsys.readouterr().err
    ends = [checkpoint.newest(folder / "pre").manifest["files"] for folder in (run, trained, other)]
    assert ends[0] == ends[1] != ends[2] and metrics(run / "pre") == metrics(trained / "pre")


def test_damaged_features_are_trained_again_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Distances and the loss `features` changed without a word; where the file cannot be made again the run is refused."""
    work = Workspace(tiny(), tmp_path / "run")
    data = work.data
    short = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", lambda data: short(data, epochs=1))
    name = features.extractor(data, tmp_path).name
    file = tmp_path / features.FILE
    whole = file.read_bytes()
    for at in (len(whole) - 5, 90):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(sound.Unsound):
            features.checked(file)
        assert features.extractor(data, tmp_path).name == name and file.read_bytes() == whole
    assert capsys.readouterr().err.count("it is trained again") == 2
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/a.json").write_text(sound.signed({"key": {"extractor": name}}, "own_xxh3_128"))
    monkeypatch.setattr(features, "train_classifier", lambda data: short(data, epochs=2))
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="figures of this run are in its features, and this machine trains another"):
        features.extractor(data, tmp_path)
