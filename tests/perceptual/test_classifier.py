"""The classifier behind `latent_lpips` on several processes, in bf16, with rows held out, stopped and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cmt_fast.cli import main
from cmt_fast.config.schema import Digits
from cmt_fast.data import digits, held_out
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.perceptual import classifier
from cmt_fast.perceptual import distance as perceptual
from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint
from tests.fixtures import forked
from tests.fixtures.tiny import metrics

SMALL = ["features.width=2", "features.batch=128", "features.lr=0.02", "features.epochs=1", "features.holdout=0.2"]


def command(folder: Path, *more: str) -> list[str]:
    return ["train-features", "digits", *SMALL, *more, "--out", str(folder)]


def two_ranks(arguments: list[str], port: str) -> list[str]:
    """What each of two processes said that run a command together."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*forked.python(), "-m", "cmt_fast", *arguments],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    return said


def test_two_processes_train_the_weights_of_one_and_go_on_to_the_same_bits(tmp_path: Path) -> None:
    assert main(command(tmp_path / "one")) == 0
    said = two_ranks(command(tmp_path / "two"), "29641")
    assert "held-out rows right" in said[0] and "held-out" not in said[1]
    one, two = (load_file(tmp_path / name / classifier.FILE) for name in ("one", "two"))
    worst = max(float((one[k] - two[k]).norm() / one[k].norm()) for k in one if one[k].ndim == 4)
    assert 0 < worst < 1e-4  # sums in another order; a rank that took its own gradient would be off by tenths
    a, b = ([r for r in metrics(tmp_path / name) if r["kind"] == "train"] for name in ("one", "two"))
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-4)
    steps = checkpoint.steps(tmp_path / "two")
    for name, ranks in (("again", 2), ("alone", 1)):  # from the first checkpoint, as another number of processes too
        shutil.copytree(tmp_path / "two", tmp_path / name)
        shutil.rmtree(checkpoint.folder_of(tmp_path / name, steps[-1]))  # the last step alone is left
        (tmp_path / name / classifier.FILE).unlink()
        _ = two_ranks(command(tmp_path / name), "29643") if ranks == 2 else main(command(tmp_path / name))
    assert (tmp_path / "again" / classifier.FILE).read_bytes() == (tmp_path / "two" / classifier.FILE).read_bytes()
    alone = load_file(tmp_path / "alone" / classifier.FILE)
    assert all(torch.allclose(alone[k], two[k], atol=1e-4) for k in two)


def test_its_accuracy_is_of_rows_that_it_never_saw_and_stays_with_it(tmp_path: Path, monkeypatch, capsys) -> None:
    """In bf16: the products of a step are, weights, momenta and what the accuracy is measured with are not."""
    seen, forward = set(), LatentVgg.forward

    def noted(self, x):
        y = forward(self, x)
        seen.add((torch.is_grad_enabled(), y.dtype))
        return y

    with monkeypatch.context() as patch:
        patch.setattr(LatentVgg, "forward", noted)
        better = ["features.width=4", "features.epochs=2", "features.lr=0.1", "features.precision=bf16"]
        assert main(command(tmp_path / "half", *better)) == 0
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    said = capsys.readouterr().out
    file, data = tmp_path / "half" / classifier.FILE, digits.load(Digits())
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[perceptual.KIND])
    _, held = held_out.split(data, 0.2, 0)
    guesses = perceptual.latent_network(file)(data.x[held]).topk(5, 1).indices == data.labels[held][:, None]
    want = {"rows": 359, "held_out": float(guesses[:, 0].double().mean())}
    want["held_out_top5"] = float(guesses.any(1).double().mean())
    assert about["accuracy"] == pytest.approx(want) and about["precision"] == "bf16"
    assert f"{want['held_out']:.2%} of 359 held-out rows right" in said
    rows = [r["held_out"] for r in metrics(tmp_path / "half") if r["kind"] == "held_out"]
    assert rows[-1] == about["accuracy"]["held_out"] > 0.25
    tensors = checkpoint.latest(tmp_path / "half").tensors("optimizer")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_a_signal_stops_between_rows_of_metrics_and_the_end_is_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(classifier, "plan", lambda f, n: classifier.Plan(10, 4, 100))
    assert main(command(tmp_path / "whole")) == 0
    step = classifier.Trainer.step

    def asked(self, n: int) -> None:
        step(self, n)
        if n == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Trainer, "step", asked)
        assert main(command(tmp_path / "vgg")) == 128 + signal.SIGTERM
    assert "a checkpoint is on disk" in capsys.readouterr().err and checkpoint.steps(tmp_path / "vgg") == [7]
    assert main(command(tmp_path / "vgg")) == 0
    same = [(tmp_path / name / classifier.FILE).read_bytes() for name in ("whole", "vgg")]
    assert same[0] == same[1]
    rows = [[{**r, "wall": 0} for r in metrics(tmp_path / name)] for name in ("whole", "vgg")]
    assert rows[0] == rows[1]


def test_time_alone_brings_a_checkpoint_and_one_of_an_older_version_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "plan", lambda f, n: classifier.Plan(8, 1, 100))
    bare = ["train-features", "digits", *SMALL[:-1], "--out"]  # what it knew: no row held out, fp32
    assert main([*bare, str(tmp_path / "whole")]) == 0
    kept, save = [], checkpoint.save

    def older(folder, n, state, about, **more):
        kept.append(n)
        features = {k: v for k, v in about["facts"]["features"].items() if k not in ("holdout", "precision")}
        about = {**about, "facts": {**about["facts"], "features": features}}
        about.pop("accuracy")
        save(folder, n, {k: v for k, v in state.items() if k != "sums"}, about, **more)
        if n == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "SAVE_S", 0.0)
        patch.setattr(checkpoint, "save", older)
        assert main([*bare, str(tmp_path / "vgg")]) == 130
    assert kept == [1, 2, 3, 4, 5]
    assert main([*bare, str(tmp_path / "vgg")]) == 0
    same = [(tmp_path / name / classifier.FILE).read_bytes() for name in ("whole", "vgg")]
    assert same[0] == same[1]


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(classifier.ConfigError, match="128 rows cannot be shared alike by 3 .* such as 129"):
        classifier._check(classifier.Features(batch=128), digits.load(Digits()))
    monkeypatch.undo()
    assert main(command(tmp_path / "vgg", "features.holdout=0.0001")) == 2
    line = capsys.readouterr().err
    assert line.startswith("cmt: features.holdout: 0.0001 of 1,797 images are 0") and line.count("\n") == 1
