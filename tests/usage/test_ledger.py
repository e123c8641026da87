"""The bill of a stage: each second of every device once, whatever was killed, stopped, resumed or moved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types

import pytest
import yaml

from cmt_fast import engine as engines
from cmt_fast.convert import card, diffusers_folder, exporting
from cmt_fast.render import templates
from cmt_fast.report import page as report
from cmt_fast.report import sections
from cmt_fast.run.judging import Judging
from cmt_fast.run.standing import Standing
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.runtime.signals import Stopped
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.train import loop
from cmt_fast.usage import bills, ledger, meters
from cmt_fast.usage.bills import Amount, Usage
from tests.fixtures.metered import World, account, amounts, manifest
from tests.fixtures.tiny import tiny

# --------------------------------------------------------------------------------------------------------- an account


def test_a_process_that_begins_a_stage_twice_bills_its_seconds_once(tmp_path):
    """What it read first was damaged: nothing was killed, and its meter has what that took."""
    folder, world = tmp_path / "pre", World()
    meter = world.meter()
    world.spend(3)
    books = account(folder, meter)
    world.spend(5)
    books.close()
    books = account(folder, meter)
    world.spend(2)
    meter.lap("startup")
    books.add()
    assert {phase: amount.seconds for phase, amount in books.bill.amounts["gpu"].items()} == {"startup": 10}


def test_restarts_bill_each_second_once(tmp_path):
    folder, world = tmp_path / "pre", World(watts=100)
    begun = world.t
    # a process that checkpoints at step 10, goes on, and is killed
    meter = world.meter()
    world.spend(2)
    books = account(folder, meter)
    meter.lap("startup")
    world.spend(16)
    meter.lap("train")
    stored = manifest(books, 10)
    world.spend(1)
    meter.lap("checkpoint")
    books.settle(10, end=False)
    world.spend(8)
    meter.lap("train")
    books.add()
    world.spend(4)
    meter.lap("evaluation")
    world.spend(1)
    books._touch()  # the last that is heard of it
    world.spend(3600)  # the GPU is somebody else's
    idle = 3600.0
    # a second one is killed before it has done anything
    meter = world.meter()
    world.spend(2)
    books = account(folder, meter, stored)
    assert amounts(books.bill) == {
        "startup": (2, 200, 0), "train": (16, 1600, 0), "checkpoint": (1, 100, 0), "stalled": (13, 800, 5),
    }  # fmt: skip
    world.spend(4)
    books._touch()
    world.spend(600)
    idle += 600
    # the third ends the stage
    meter = world.meter()
    world.spend(2)
    books = account(folder, meter, stored)
    meter.lap("startup")
    world.spend(32)
    with meter.within("teacher"):
        world.spend(32)
    meter.lap("train")
    stored = manifest(books, 20)
    world.spend(1)
    meter.lap("checkpoint")
    books.settle(20, end=True)
    books.close()
    whole = bills.of_stage(folder, stored)
    assert amounts(whole) == {
        "startup": (4, 400, 0), "train": (48, 4800, 0), "checkpoint": (2, 200, 0), "teacher": (32, 3200, 0),
        "stalled": (19, 800, 11),
    }  # fmt: skip
    assert whole.total("gpu").seconds == world.t - begun - idle
    assert not (folder / ledger.ALIVE).exists()
    # of the same stage taken up again nothing is lost, and nothing is billed for the time between
    world.spend(1000)
    again = account(folder, world.meter(), stored)
    assert amounts(again.bill) == amounts(whole)


def test_a_kill_between_a_checkpoint_and_its_settling_loses_nothing(tmp_path):
    world = World(watts=100)
    meter = world.meter()
    books = account(tmp_path / "pre", meter)
    world.spend(8)
    meter.lap("train")
    stored = manifest(books, 10)
    world.spend(2)  # it is written, the process dies before it can say what that took
    books._touch()
    books = account(tmp_path / "pre", world.meter(), stored)
    assert amounts(books.bill) == {"train": (8, 800, 0), "stalled": (2, None, 2)}


def test_a_damaged_checkpoint_makes_what_came_after_the_one_before_it_lost(tmp_path):
    world = World(watts=100)
    meter = world.meter()
    books = account(tmp_path / "pre", meter)
    world.spend(8)
    meter.lap("train")
    older = manifest(books, 10)
    books.settle(10, end=False)
    world.spend(8)
    meter.lap("train")
    manifest(books, 20)
    books.settle(20, end=True)
    books = account(tmp_path / "pre", world.meter(), older)
    assert amounts(books.bill) == {"train": (8, 800, 0), "stalled": (8, 800, 0)}


def test_the_number_of_processes_and_the_kind_of_device_may_change(tmp_path, monkeypatch):
    world = World(watts=100)
    meter = world.meter()
    books = account(tmp_path / "pre", meter)
    world.spend(4)
    meter.lap("train")
    stored = manifest(books, 5)
    books.settle(5, end=True)
    monkeypatch.setattr(distributed, "every_rank", lambda x: [x, x, x])  # three equal ranks
    meter = world.meter()
    books = account(tmp_path / "pre", meter, stored)
    world.spend(4)
    meter.lap("train")
    stored = manifest(books, 10)
    books.settle(10, end=False)
    world.spend(2)
    books._touch()  # a kill: three GPUs for two seconds
    monkeypatch.undo()
    world.works, world.reason = False, "no GPU"
    meter = world.meter("core", 2)
    books = account(tmp_path / "pre", meter, stored)
    world.spend(8)
    meter.lap("train")
    whole = Usage.of(manifest(books, 15)["bill"])
    assert amounts(whole) == {"train": (16, 1600, 0), "stalled": (6, None, 6)}
    assert amounts(whole, "core") == {"train": (16, None, 16)} and whole.reason == "no GPU"


def test_a_manifest_from_before_there_were_bills(tmp_path):
    world = World()
    meter = world.meter()
    books = account(tmp_path / "pre", meter, {"step": 10, "nimg": 320, "wall": {"train_s": 5.0, "eval_s": 0.0}})
    world.spend(2)
    meter.lap("train")
    whole = Usage.of(books.add())
    assert whole.from_nimg == 320 and amounts(whole) == {"train": (2, 0, 0)}
    assert bills.of_stage(tmp_path / "mid", {"step": 10, "nimg": 320}) is None


def test_a_torn_bill_is_passed_over_for_the_manifests(tmp_path):
    world = World()
    meter = world.meter()
    books = account(tmp_path / "pre", meter)
    world.spend(2)
    meter.lap("train")
    stored = manifest(books, 10)
    (tmp_path / "pre" / ledger.FILE).write_text('{"bill": {"amounts"')
    assert amounts(account(tmp_path / "pre", world.meter(), stored).bill) == {"train": (2, 0, 0)}


# ---------------------------------------------------------------------------------------------------------- real runs

RUN = [f"{s}.images_nimg={32 * 40}" for s in ("pre", "mid")] + [
    f"{s}.checkpoint_every_nimg={32 * 8}" for s in ("pre", "mid")
]
STEP_S, FILL_S, LOOK_S, SAVE_S, BUILD_S = 1.0, 2.0, 4.0, 0.5, 8.0


@pytest.fixture
def paced(monkeypatch):
    """Steps, rollouts, evaluations, saves and start-up take the times above, and nothing else takes any."""
    world = World()
    world.works, world.steps = False, []

    def takes(seconds, owner, name, note=None):
        real = getattr(owner, name)

        def slow(*given, **named):
            world.spend(seconds)
            if note:
                note()
            return real(*given, **named)

        monkeypatch.setattr(owner, name, slow)

    takes(STEP_S, engines.LocalEngine, "step", lambda: world.steps.append(world.t))
    takes(FILL_S, sys.modules["cmt_fast.teacher.pool"].Pool, "_fill")
    takes(LOOK_S, Judging, "evaluate")
    takes(SAVE_S, engines.LocalEngine, "snapshot")  # the copy: what is written beside the steps is no time of theirs
    takes(BUILD_S, engines, "build")
    monkeypatch.setattr(meters, "time", types.SimpleNamespace(perf_counter=world.now, time=world.now))
    monkeypatch.setattr(ledger, "PULSE_S", 0)
    return world


def test_a_killed_and_resumed_run_bills_each_stage_once(tmp_path, paced, monkeypatch):
    work = Workspace(tiny("digits", *RUN, "pre.eval_every_nimg=640", "mid.trajectories.pool_steps=4"), tmp_path)
    begun = paced.t

    class Killed(BaseException):
        pass

    real, alive = engines.LocalEngine.step, []

    def die(engine, lr):
        if engine.step_count == 20:
            raise Killed
        return real(engine, lr)

    with monkeypatch.context() as once:
        once.setattr(engines.LocalEngine, "step", die)
        with pytest.raises(Killed):
            loop.train(work, ["pre", "mid"])
    alive.append(paced.t - begun)
    assert not checkpoint.latest(tmp_path / "pre").manifest["done"]
    paced.spend(500)
    begun = paced.t
    loop.train(work, ["pre", "mid"])
    alive.append(paced.t - begun)
    stands = {name: report.stand(work, name) for name in ("pre", "mid")}
    pre, mid = (stand.bill for stand in stands.values())
    seconds = lambda bill: {phase: amount.seconds for phase, amount in bill.amounts["core"].items()}
    # the first process: 20 steps, checkpoints at 8, 16 and 20, evaluated after that; nothing was done again
    assert seconds(pre) == {
        "startup": 2 * BUILD_S, "train": 40 * STEP_S, "evaluation": 2 * LOOK_S, "checkpoint": 6 * SAVE_S,
    }  # fmt: skip
    assert seconds(mid) == {
        "startup": BUILD_S, "train": 40 * STEP_S, "teacher": 10 * FILL_S, "checkpoint": 5 * SAVE_S,
    }  # fmt: skip
    assert pre.total("core").seconds + mid.total("core").seconds == sum(alive)
    assert pre.total("core").joules is None and pre.total("core").kwh is None
    # the model card adds up the stages behind the weights
    export = exporting.collect(work, "mid")
    page = card.markdown(work, "mid", export.about, card.Terms(), diffusers_folder.described(export))
    front = yaml.safe_load(page.split("---\n")[1])["cmt_fast"]
    assert front["stages"] == ["pre", "mid"] and (front["gpu_hours"], front["kwh"]) == (0, None)
    assert front["core_hours"] == pytest.approx(sum(alive) / 3600)
    assert f"{sum(alive) / 3600:.4g} core-hours, energy not measured: stages pre, mid" in page
    with monkeypatch.context() as patch:  # a stage of which the first images were trained before anyone counted
        patch.setattr(card, "_bill", lambda _, node: mid._replace(from_nimg=8 * (node["stage"] == "pre")))
        assert card._spent(work, export.about)["core_hours"] is None
    log = metrics_log.read(stands["pre"].folder / metrics_log.METRICS)
    # rows add up as the run goes, and a third start finds both stages done and bills nothing
    rows = [row["wall"]["bill"]["amounts"]["core"]["train"]["seconds"] for row in log if row["kind"] == "train"]
    assert rows == sorted(rows) and rows[-1] == 40 * STEP_S
    before = {p: p.read_bytes() for p in tmp_path.rglob("bill.*")}
    loop.train(work, ["pre", "mid"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("bill.*")} == before


def test_a_stop_by_signal_loses_nothing(tmp_path, paced, monkeypatch):
    work = Workspace(tiny("digits", *RUN), tmp_path)
    with monkeypatch.context() as asked:
        asked.setattr(loop, "noted", lambda: contextlib.nullcontext([15]))
        with pytest.raises(Stopped):
            loop.train(work, ["pre"])
    assert not (tmp_path / "pre" / ledger.ALIVE).exists()
    paced.spend(500)
    loop.train(work, ["pre"])
    whole = report.stand(work, "pre").bill.amounts["core"]
    assert "stalled" not in whole and whole["train"].seconds == 40 * STEP_S


def test_a_real_sigkill_is_billed_to_within_the_pulse(tmp_path, monkeypatch):
    """A child is killed outright; what it left and what the next process adds is the time that both lived."""
    monkeypatch.setattr(ledger, "PULSE_S", 0.05)
    work, before = Workspace(tiny("digits", *RUN), tmp_path), engines.LocalEngine.step
    reading, writing = os.pipe()
    child = os.fork()
    if not child:

        def step(engine, lr):
            if engine.step_count == 20:
                time.sleep(0.5)
                os.write(writing, repr(time.time()).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return before(engine, lr)

        engines.LocalEngine.step = step
        os.write(writing, f"{time.time()!r} ".encode())
        try:
            loop.train(work, ["pre"])
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    born, died = map(float, os.read(reading, 100).split())
    start = time.time()
    loop.train(work, ["pre"])
    lived = (died - born) + (time.time() - start)
    whole = report.stand(work, "pre").bill
    assert whole.amounts["core"]["stalled"].seconds > 0.4
    assert lived - 0.4 < whole.total("core").seconds < lived + 0.01


def test_the_report_shows_the_bill(tmp_path):
    stage = tiny("digits").pre
    amounts = {"train": Amount(7200, 3.6e6, 0), "teacher": Amount(1800, 1.8e6, 0), "stalled": Amount(3600, 9e5, 360)}
    stand = Standing("mid", stage, tmp_path, manifest={"nimg": 70_000}, bill=Usage({"gpu": amounts}))
    section = sections.bill({"mid": stand})
    (table,) = section.groups[0].items
    cells = dict(zip(table.head, table.rows[0]))
    assert cells == {
        "stage": "mid", "GPU-hours": "3.5", "train": "2", "teacher": "0.5", "stalled": "1", "kWh": "at least 1.75",
        "images per GPU-hour": "20,000",
    }  # fmt: skip
    assert dict(zip(table.head, table.rows[1]))["teacher"] == "0.5" and table.rows[1][0] == "kWh"
    assert table.rows[2][1:5] == ["3.5", "57.1%", "14.3%", "28.6%"]
    page = templates.markdown("run", [section])
    assert "killed" in page and "| mid | 3.5 | 2 | 0.5 | 1 | at least 1.75 | 20,000 |" in page
    known = stand._replace(bill=Usage({"core": {"train": Amount(3600, None, 3600)}}, reason="no GPU"))
    section = sections.bill({"mid": known})
    assert section.groups[0].items[0].rows[0][-2] == sections.DASH and "no GPU" in section.text[-1]
    assert not sections.bill({"mid": stand._replace(bill=None)}).groups
