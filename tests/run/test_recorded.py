"""What a run remembers of itself is not believed where it was damaged; it is made anew where that is proven to be the same."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil

import pytest
import torch

from bench.safety import damage
from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import features
from cmt_fast.run import changes
from cmt_fast.run.folder import RUN_FILE, about_run, stored_run
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, metrics_log, sound
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


def test_a_change_outlives_the_run_json_that_says_it(tmp_path, capsys):
    """With it went the stage's older settings and where steps and rows are counted from: other rows were drawn, in silence."""
    more, run, whole = ("pre.images_nimg=256", "pre.checkpoint_every_nimg=64"), tmp_path / "run", tmp_path / "whole"
    save, ends = checkpoint.save, [3, 5]

    def until(*given, **kept):
        out = save(*given, **kept)
        if given[1] >= ends[0]:
            raise KeyboardInterrupt
        return out

    settings = tiny("digits", *SHORT, *more)
    for asked in ([], ["pre.batch=16", "pre.lr=0.01"]):
        changed, wanted = changes.asked(settings, run, asked) if asked else (settings, {})
        work = Workspace(changed, run)
        work.changing = wanted
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", until)
            loop.train(work, ["pre"])
        ends.pop(0)
    shutil.copytree(run, whole)
    (run / RUN_FILE).unlink()
    assert changes.recorded(run) == changes.recorded(whole) != {}
    (run / RUN_FILE).write_bytes(b"{")
    for folder in (whole, run):
        again, notes = changes.adopted(settings, folder)
        assert len(notes) == 2
        loop.train(Workspace(again, folder), ["pre"])
    assert "put aside as run.json.damaged" in capsys.readouterr().err
    found = [checkpoint.newest(folder / "pre").manifest for folder in (run, whole)]
    assert all(found[0][key] == found[1][key] for key in ("files", "changes", "step", "nimg"))
    assert metrics(run / "pre") == metrics(whole / "pre")
    assert all(about_run(run)[key] == about_run(whole)[key] for key in ("changes", "contents"))


def test_damage_of_all_kinds_is_seen(trained, tmp_path, capsys):
    """A sample of `python -m bench damage`; where rows are not looked at it finds that."""
    given = argparse.Namespace(n=12, others=20, resume=0, report=0, seed=1, run=trained, json=tmp_path / "damage.json")
    assert damage.run(given) == 0, capsys.readouterr().out
    found = json.loads(given.json.read_text())
    assert found["flips"] == 12 and found["flips_named_by_verify"] >= 10 and found["truncations"] >= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "unsealed", lambda line, of: line.rpartition(metrics_log.MARK)[0] + b"}")
        given.n, given.others = 256, 0  # of 64 flips none may fall into a row
        assert damage.run(given) == 1


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
