"""What loggers get: every row and picture of a stage on one axis, without what a kill undid; and what one that fails costs."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
import threading
import time
import types

import pytest

from cmt_fast.config.errors import ConfigError
from cmt_fast.run import needs
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import loggers
from cmt_fast.storage.loggers import Opening, known_id
from cmt_fast.storage.metrics_log import Log, read
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny

BATCH, BEFORE = 32, 1000
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000030000000208000000008f48a6220000000c4944415478da6360606060000000080001fb5fe7b40000000049454e44ae426082"
)
WALL = {
    "train_s": 3600.0,
    "eval_s": 1800.0,
    "images_per_s": 5.0,
    "bill": {"amounts": {"gpu": {"train": {"seconds": 7200}}}},
}


class FakeWandb(types.ModuleType):
    """The part of wandb that is called, and what it was called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []

    def Settings(self, **settings):
        return settings

    def Image(self, path, caption):
        return (path, caption)

    def init(self, **how):
        about = {"how": how, "rows": [], "exit": None, "axes": {}}
        self.runs.append(about)
        return types.SimpleNamespace(
            id=how["id"],
            define_metric=lambda name, **more: about["axes"].update({name: more.get("step_metric")}),
            log=about["rows"].append,
            finish=lambda exit_code: about.update(exit=exit_code),
        )


class FakeMlflow(types.ModuleType):
    """The part of mlflow that is called: one store, whose runs have metrics, parameters, pictures and a status."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict] = {}
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda *row: row
        self.entities.Param = lambda *pair: pair

    def Image(self, path):
        return path

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"made {name}"

    def create_run(self, experiment, run_name, tags):
        name = f"id{len(self.runs)}"
        self.runs[name] = {
            "in": experiment,
            "name": run_name,
            "metrics": [],
            "params": {},
            "pictures": [],
            "status": "",
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    def update_run(self, name, status):
        self.runs[name]["status"] = status

    def log_batch(self, name, metrics=(), params=()):
        self.runs[name]["metrics"] += metrics
        self.runs[name]["params"].update(params)

    def log_image(self, name, image, key, step, timestamp):
        self.runs[name]["pictures"].append((key, step))

    def set_terminated(self, name, status):
        self.runs[name]["status"] = status


@pytest.fixture
def fakes(monkeypatch):
    """wandb and mlflow that keep what they get; nothing of the surroundings' own."""
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for name, module in (("wandb", wandb), ("mlflow", mlflow), ("mlflow.entities", mlflow.entities)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loggers, "missing", lambda names: [])
    return wandb, mlflow


def opened(folder, step: int, names, total: int = 4) -> Log:
    folder.mkdir(parents=True, exist_ok=True)
    about = Opening("run", folder, total * BATCH, BEFORE, step * BATCH, settings={"a": {"b": 1}, "c": None})
    return Log(folder, step, True, names, about)


def rows(log: Log, steps, plus: float = 0.0) -> None:
    """A row a step, an evaluation every second, a picture with it."""
    for step in steps:
        log.row("train", step, step * BATCH, {"loss": step + plus, "lr": 0.1}, WALL)
        if step % 2 == 0:
            figures = {"1": {"frechet": 10.0 * step}, "2": {"frechet": 5.0 * step}}
            log.row("eval", step, step * BATCH, {"steps": figures, "labels": "data"})
            file = log.run / "mid" / "grids" / f"{step:08d}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(PNG)
            log.picture("samples", step * BATCH, file)


def killed(log: Log) -> None:
    """As a kill leaves it: nothing is closed; but what was sent has arrived."""
    for worker in log.loggers.workers:
        arrived = threading.Event()
        worker.put(lambda logger, arrived=arrived: arrived.set())
        assert arrived.wait(10)
    log.file.close()


def at(*steps: int) -> list[int]:
    return [BEFORE + step * BATCH for step in steps]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_back_all_and_drops_what_a_kill_undid(tmp_path):
    from tensorboard.backend.event_processing import plugin_event_accumulator  # what its server reads by
    from tensorboard.util.tensor_util import make_ndarray

    folder = tmp_path / "mid"
    log = opened(folder, 0, ["tensorboard"])
    rows(log, (1, 2, 3, 4), plus=0.5)
    killed(log)
    second = opened(folder, 2, ["tensorboard"])
    rows(second, (3, 4), plus=0.7)
    killed(second)
    third = opened(folder, 2, ["tensorboard"])
    rows(third, (3, 4))
    third.close()
    events = plugin_event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard" / "mid"), size_guidance={"tensors": 0}
    )
    events.Reload()
    value = lambda event: float(make_ndarray(event.tensor_proto))
    tags = [tag for tag in events.Tags()["tensors"] if tag != "samples"]
    scalars = {tag: [(e.step, value(e)) for e in events.Tensors(tag)] for tag in tags}
    assert scalars["train/loss"] == list(zip(at(1, 2, 3, 4), (1.5, 2.5, 3.0, 4.0)))
    assert scalars["eval/frechet/1-step"] == list(zip(at(2, 4), (20.0, 40.0)))
    assert scalars["eval/frechet/2-steps"] == list(zip(at(2, 4), (10.0, 20.0)))
    hours = {name: values[-1][1] for name, values in scalars.items() if name.startswith(("hours", "speed"))}
    assert hours == {"hours/wall": 1.5, "hours/gpu": 2.0, "speed/images_per_s": 5.0}
    pictures = events.Tensors("samples")
    assert [p.step for p in pictures] == at(2, 4)
    assert list(pictures[0].tensor_proto.string_val) == [b"3", b"2", PNG]


def test_the_others_go_on_in_the_same_run_and_get_nothing_twice(tmp_path, fakes):
    wandb, mlflow = fakes
    folder, names = tmp_path / "mid", ["wandb", "mlflow"]
    log = opened(folder, 0, names)
    rows(log, (1, 2, 3))
    killed(log)
    ids = json.loads((folder / "loggers.json").read_text())
    again = opened(folder, 2, names)
    rows(again, (3, 4))
    again.close()
    assert json.loads((folder / "loggers.json").read_text()) == ids
    first, second = wandb.runs
    assert first["how"]["id"] == second["how"]["id"] == ids["wandb"] and second["how"]["resume"] == "allow"
    assert first["how"]["group"] == "run" and first["how"]["config"] == {"a": {"b": 1}, "c": None}
    sent = [row for run in wandb.runs for row in run["rows"]]
    assert [row["images"] for row in sent if "train/loss" in row] == at(1, 2, 3, 4)
    assert [row["images"] for row in sent if "samples" in row] == at(2, 4)
    assert second["axes"]["*"] == "images" and second["exit"] == 0
    (run,) = mlflow.runs.values()
    assert run["in"] == "made Default" and run["params"] == {"a.b": "1"} and run["status"] == "FINISHED"
    assert [row[3] for row in run["metrics"] if row[0] == "train/loss"] == at(1, 2, 3, 4)
    assert run["pictures"] == [("samples", x) for x in at(2, 4)]


def test_a_logger_that_comes_later_gets_what_was_before(tmp_path, fakes):
    folder = tmp_path / "mid"
    log = opened(folder, 0, [])
    rows(log, (1, 2, 3))
    log.close()
    again = opened(folder, 2, ["wandb"])
    rows(again, (3,))
    again.close()
    (run,) = fakes[0].runs
    assert [row["images"] for row in run["rows"] if "train/loss" in row] == at(1, 2, 3)
    assert [row["images"] for row in run["rows"] if "samples" in row] == at(2)
    assert run["exit"] == 1, "the stage is not at its end"


def test_offline_is_left_to_the_library(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened(tmp_path / "mid", 0, ["wandb"]).close()
    how = fakes[0].runs[0]["how"]
    assert "mode" not in how and "resume" not in how and "project" not in how and how["dir"] == str(tmp_path)


@pytest.mark.parametrize("when", ["opening", "logging"])
def test_one_that_fails_is_one_line_and_the_others_go_on(tmp_path, fakes, monkeypatch, capsys, when):
    wandb, mlflow = fakes

    def refuse(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(mlflow, "create_run" if when == "opening" else "log_batch", refuse)
    if when == "logging":  # parameters are sent when it is opened; rows are what fails
        monkeypatch.setattr(mlflow, "log_batch", lambda *_, metrics=(), **__: refuse() if metrics else None)
    log = opened(tmp_path / "mid", 0, ["mlflow", "wandb"])
    rows(log, (1, 2, 3, 4))
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("cmt: mlflow: no network; it gets nothing ")
    assert len(fakes[0].runs[0]["rows"]) == 8 and len(read(tmp_path / "mid" / "metrics.jsonl")) == 6


@pytest.mark.parametrize("uri", ["", "file:runs"])
def test_a_store_that_mlflow_refuses_is_one_line_that_says_what_to_set(tmp_path, fakes, monkeypatch, capsys, uri):
    def refuse(*_, **__):
        raise ValueError(
            "The filesystem tracking backend is in maintenance mode. " * 9 + "set `MLFLOW_ALLOW_FILE_STORE=true`"
        )

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(fakes[1], "get_experiment_by_name", refuse)
    opened(tmp_path / "mid", 0, ["mlflow"]).close()
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        said.startswith(f"cmt: mlflow: MLFLOW_TRACKING_URI is {repr(uri) if uri else 'not set'}")
        and "maintenance" not in said
    )
    assert "only with MLFLOW_ALLOW_FILE_STORE=true" in said and "it gets nothing of mid" in said


def test_training_does_not_wait_for_a_slow_one(tmp_path, fakes, monkeypatch, capsys):
    wandb, _ = fakes
    go = threading.Event()
    log = opened(tmp_path / "mid", 0, ["wandb"])
    worker = log.loggers.workers[0]
    worker.put(lambda logger: go.wait(30) and None)
    rows(log, (1, 2, 3, 4))  # would never come back
    monkeypatch.setattr(loggers, "DRAIN_S", 0.01)
    log.close()
    assert "cmt: wandb: is not done after" in capsys.readouterr().err and wandb.runs[0]["rows"] == []
    go.set()
    worker.thread.join(10)
    assert len(wandb.runs[0]["rows"]) == 8


def test_stages_of_a_run_are_on_one_axis_and_their_grids_are_sent(tmp_path, fakes):
    run = tiny("digits", "loggers=[wandb,wandb]", "pre.images_nimg=64", "mid.images_nimg=64", "eval.n_during=20",
               "mid.eval_every_nimg=64")  # fmt: skip
    loop.train(Workspace(run, tmp_path), ["pre", "mid"])
    pre, mid = fakes[0].runs
    axis = lambda about, name: [row["images"] for row in about["rows"] if name in row]
    assert axis(pre, "train/loss") == [32, 64] and axis(mid, "train/loss") == [64 + 32, 64 + 64]
    assert axis(mid, "eval/frechet/1-step") == axis(mid, "samples") == [128]
    assert pre["exit"] == mid["exit"] == 0 and known_id(tmp_path / "mid", "wandb") == mid["how"]["id"]


def test_a_package_that_is_missing_is_said_before_training(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    run = tiny("digits", "loggers=[wandb]")
    assert str(needs.missing(run, tmp_path, None, ["pre"])[0]) == (
        "loggers: 'wandb' is not installed; pip install 'cmt-fast[wandb]'"
    )
    with pytest.raises(ConfigError, match=r"loggers: 'wandb' is not installed; pip install 'cmt-fast\[wandb\]'"):
        loop.train(Workspace(run, tmp_path / "run"), ["pre"])
    assert not (tmp_path / "run").exists()


def test_the_older_key_names_one_of_them():
    assert tiny("digits", "tensorboard=true", "loggers=[mlflow,tensorboard]").logging == ("tensorboard", "mlflow")
    assert tiny().logging == ()


def test_a_logger_whose_disk_was_full_gets_what_it_missed(tmp_path, monkeypatch, capsys):
    """As TensorBoard's does, whose thread tells of it a row later: every row comes, and those that may have been lost twice."""
    opened, room = [], threading.Event()

    class Board:
        fresh = True

        def __init__(self, about):
            opened.append((about.nimg, rows := []))
            self.rows, self.broken = rows, False

        def scalars(self, at, values, when):
            if self.broken:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.broken = at >= 4 * BATCH and not room.is_set()
            self.rows += [at] * (not self.broken)

        def close(self, whole):
            pass

    monkeypatch.setitem(
        sys.modules, "cmt_fast.storage.loggers.to_tensorboard", types.SimpleNamespace(open_logger=Board)
    )
    monkeypatch.setattr(loggers, "AGAIN_S", 0.0)
    (tmp_path / "pre").mkdir()
    log = Log(tmp_path / "pre", 0, True, ["tensorboard"], Opening("run", tmp_path / "pre", 10 * BATCH))
    for n in range(1, 9):
        if n == 7:
            _idle(log)
            room.set()
        log.row("train", n, n * BATCH, {"loss": 1.0})
    log.close()
    got = sorted({at for _, rows in opened for at in rows})
    assert got == [n * BATCH for n in range(1, 9)] and len(opened) > 1
    assert opened[1][0] <= 3 * BATCH  # before the first row that may be lost
    said = capsys.readouterr().err
    assert "tensorboard: No space left on device; what it is to get waits" in said and "found no room" not in said


def _idle(log: Log) -> None:
    """Until its logger has done what it can."""
    worker = log.loggers.workers[0]
    for _ in range(200):
        if worker.jobs.empty() and worker.broken:
            return
        time.sleep(0.01)
