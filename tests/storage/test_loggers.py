"""Loggers: what TensorBoard reads back after a kill, what W&B and MLflow are asked, and that none of them ends a run."""

from __future__ import annotations

import json
import struct
import sys
import types

import pytest

from cmt_fast.config import fingerprint
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import loggers
from cmt_fast.storage.loggers import Opening
from cmt_fast.storage.metrics_log import Log, read
from cmt_fast.train import loop
from tests.fixtures.tiny import stop_after_a_checkpoint, tiny

PRE = 64  # images of pre-training, with which the axis of mid-training begins
EVERY = [f"mid.{key}_every_nimg=160" for key in ("checkpoint", "eval", "grid")]


@pytest.mark.parametrize("before", ["loggers=[tensorboard]", "loggers=[]"], ids=["killed", "named later"])
def test_tensorboard_shows_each_row_once_on_the_axis_of_all_stages(before, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    short = [f"pre.images_nimg={PRE}", "mid.images_nimg=480", "eval.n_during=20", *EVERY]
    out = tmp_path / "run"
    loop.train(Workspace(tiny("digits", *short, before), out), ["pre"])
    stop_after_a_checkpoint(Workspace(tiny("digits", *short, before), out))
    loop.train(Workspace(tiny("digits", *short, "tensorboard=true"), out), ["mid"])  # the older word for the same

    events = accumulator.EventAccumulator(str(out / "tensorboard" / "mid"), {"scalars": 0, "images": 0})
    events.Reload()
    rows = read(out / "mid" / "metrics.jsonl")
    exact = lambda x: struct.unpack("f", struct.pack("f", x))[0]
    for kind, tag, value in (
        ("train", "train/loss", lambda row: row["loss"]),
        ("train", "train/lr", lambda row: row["lr"]),
        ("train", "speed/images_per_s", lambda row: row["wall"]["images_per_s"]),
        ("eval", "eval/frechet/1-step", lambda row: row["steps"]["1"]["frechet"]),
        ("eval", "eval/frechet/2-steps", lambda row: row["steps"]["2"]["frechet"]),
    ):
        wanted = [(PRE + row["nimg"], exact(value(row))) for row in rows if row["kind"] == kind]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == wanted, tag
    pictures = sorted((out / "mid" / "grids").glob("0*.png"))
    shown = [(e.step, e.encoded_image_string) for e in events.Images("samples")]
    assert shown == [(PRE + 32 * int(file.stem), file.read_bytes()) for file in pictures]
    assert "mid at" in events.SummaryMetadata("samples").summary_description


class Fake:
    """What W&B and MLflow were asked, in order; `broken` names a call that raises."""

    def __init__(self, monkeypatch, broken=""):
        self.asked, self.broken = [], broken
        wandb, mlflow, entities = (types.ModuleType(n) for n in ("wandb", "mlflow", "mlflow.entities"))
        wandb.init = lambda **k: self.call("init", **k) or types.SimpleNamespace(
            id=k["id"], log=lambda row: self.call("log", **row), define_metric=lambda *a, **k: None,
            finish=lambda exit_code: self.call("finish", exit_code=exit_code),
        )  # fmt: skip
        wandb.Settings, wandb.Image = dict, lambda path, caption: (path, caption)
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="made"))
        mlflow.MlflowClient = lambda: types.SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: f"id of {name}",
            create_run=lambda *a, **k: self.call("init", experiment=a[0], **k) or run,
            update_run=lambda id, status: self.call("init", known=id),
            log_batch=lambda id, metrics=(), params=(): [
                self.call("log", images=at, **{k: v}) for k, v, _, at in metrics
            ],
            log_image=lambda id, image, key, step, timestamp: self.call("log", **{key: image, "images": step}),
            set_terminated=lambda id, status: self.call("finish", status=status),
        )
        mlflow.Image, entities.Metric, entities.Param = str, lambda *a: a, lambda *a: a
        for module in (wandb, mlflow, entities):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def call(self, name, /, **values):
        self.asked.append((name, values))
        if name == self.broken:
            raise OSError("the network\nis down")

    def of(self, name):
        return [values for call, values in self.asked if call == name]


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "run" / "mid"
    folder.mkdir(parents=True)
    return Opening("digits", folder, before_nimg=1000, settings={"model": {"width": 16}})


def logged(stage, name, begin, end, whole=False):
    log = Log(stage.folder, begin, True, (name,), stage._replace(nimg=10 * begin))
    for n in range(begin + 1, end + 1):
        log.row("train", n, 10 * n, {"loss": 1.0 / n}, {"images_per_s": 5.0})
    picture = stage.folder / "x.png"
    picture.write_bytes(b"")
    log.picture("samples", 10 * end, picture)
    log.commit(whole)
    log.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_that_was_killed_goes_on_under_its_id_and_sends_nothing_twice(name, stage, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    fake = Fake(monkeypatch)
    logged(stage, name, 0, 4)
    logged(stage, name, 2, 6, whole=True)  # a checkpoint after step 2: steps 3 and 4 are trained again
    sent = [(row["images"], row["train/loss"]) for row in fake.of("log") if "train/loss" in row]
    assert sent == [(1000 + 10 * n, 1.0 / n) for n in range(1, 7)]
    assert [row["images"] for row in fake.of("log") if "samples" in row] == [1040, 1060]
    first, second = fake.of("init")
    known = json.loads((stage.folder / loggers.IDS).read_text())[name]
    if name == "wandb":
        assert first["id"] == second["id"] == known and second["resume"] == "allow"
        assert (first["group"], first["name"], first["config"]) == ("digits", "digits mid", stage.settings)
        assert [end["exit_code"] for end in fake.of("finish")] == [1, 0]
    else:
        assert first["experiment"] == "id of digits" and second["known"] == known == "made"
        assert [end["status"] for end in fake.of("finish")] == ["KILLED", "FINISHED"]


@pytest.mark.parametrize("broken, calls", [("init", 0), ("log", 1), ("finish", 5)])
def test_a_logger_that_fails_is_said_once_and_the_record_is_whole(broken, calls, stage, monkeypatch, capsys):
    fake = Fake(monkeypatch, broken)
    logged(stage, "wandb", 0, 4)
    assert [row["step"] for row in read(stage.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("cmt: wandb: the network is down; it gets nothing")
    assert len(fake.of("log")) == calls


def test_a_logger_that_is_not_installed_is_an_error_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"loggers: 'mlflow' is not installed; pip install 'cmt-fast\[mlflow\]'"):
        loop.train(Workspace(tiny("digits", "loggers=[mlflow]"), tmp_path / "run"), ["pre"])
    assert not (tmp_path / "run" / "pre").exists()


def test_loggers_are_in_no_digest():
    plain, logging = tiny(), tiny("digits", "loggers=[wandb, mlflow]", "tensorboard=true")
    assert logging.logging == ("tensorboard", "wandb", "mlflow")
    assert fingerprint.digest(plain) == fingerprint.digest(logging)
    assert fingerprint.stage_digest(plain, "mid") == fingerprint.stage_digest(logging, "mid")
