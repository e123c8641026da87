"""Meters under a clock and a counter of our own: every second to its phase, energy null where nobody knows it."""

from __future__ import annotations

import json
import os
import sys
import time
import types

import pytest
import torch

from cmt_fast.runtime import distributed
from cmt_fast.usage import ledger
from cmt_fast.usage.bills import Amount, Usage
from cmt_fast.usage.meters import Counter, Meter
from tests.fixtures.metered import World, account, amounts

# ------------------------------------------------------------------------------------------------------------ a meter


def test_each_stretch_goes_to_its_phase_and_parts_to_theirs():
    world = World(watts=200)
    meter = world.meter()
    world.spend(3)
    assert meter.lap("startup") == 3
    world.spend(4)
    with meter.within("teacher"):
        world.spend(8)
        with meter.within("stalled"):
            world.spend(4)
    assert meter.lap("train") == 16
    spent, held = meter.take()
    assert held == 1 and {k: tuple(v) for k, v in spent.items()} == {
        "startup": (3, 600, 0), "train": (4, 800, 0), "teacher": (8, 1600, 0), "stalled": (4, 800, 0),
    }  # fmt: skip
    assert meter.take()[0] == {}


def test_parts_end_with_an_error_too():
    world = World()
    meter = world.meter()
    with pytest.raises(FloatingPointError), meter.within("teacher"):
        world.spend(2)
        raise FloatingPointError
    world.spend(1)
    meter.lap("train")
    assert {k: v.seconds for k, v in meter.take()[0].items()} == {"teacher": 2, "train": 1}


def test_a_counter_that_went_back_and_one_that_failed_leave_null_and_keep_the_seconds():
    world = World(watts=100)
    meter = world.meter()
    world.spend(8)
    world.mj = 7  # the driver was loaded anew, or the counter wrapped
    meter.lap("train")
    world.spend(4)
    meter.lap("evaluation")  # counted from 7 on
    world.works = False
    world.spend(2)
    meter.lap("checkpoint")
    world.works = True
    world.spend(2)
    meter.lap("train")  # its start was not read
    world.spend(16)
    meter.lap("train")
    spent, _ = meter.take()
    assert tuple(spent["evaluation"]) == (4, 400, 0) and spent["evaluation"].kwh == 400 / 3.6e6
    assert tuple(spent["checkpoint"]) == (2, None, 2) and spent["checkpoint"].kwh is None
    assert tuple(spent["train"]) == (26, 1600, 10) and spent["train"].kwh is None


def test_on_a_cpu_cores_are_counted_and_energy_is_null(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    meter = Meter.of(torch.device("cpu"))
    assert (meter.unit, meter.held, meter.counter.read()) == ("core", 4, None)
    world = World()
    world.works = False
    meter = world.meter("core", 4)
    world.spend(2)
    meter.lap("train")
    assert tuple(meter.take()[0]["train"]) == (8, None, 8)


def test_two_ranks_are_added_up(monkeypatch, tmp_path):
    ranks = [World(watts=300), World(watts=100)]
    meters = [world.meter() for world in ranks]
    ranks[1].works = False  # the second rank's counter cannot be read at the end of its first stretch
    for world, meter, seconds in zip(ranks, meters, (4, 6)):
        world.spend(seconds)
        meter.lap("train")
    ranks[1].works = True
    ranks[1].spend(2)
    meters[1].lap("checkpoint")
    said: list[list[float]] = []
    monkeypatch.setattr(distributed, "every_rank", lambda x: said.append(x) or [x])
    meters[1].take()
    monkeypatch.setattr(distributed, "every_rank", lambda x: [x, said[0]])
    books = account(tmp_path / "pre", meters[0])
    both = Usage.of(books.add())
    assert amounts(both) == {"train": (10, 1200, 6), "checkpoint": (2, None, 2)} and both.total("gpu").kwh is None
    assert json.loads((tmp_path / "pre" / ledger.FILE).read_text())["held"] == {"gpu": 2}


def test_two_processes_add_up_their_meters(tmp_path):
    """The same over a real process group, of two children."""
    pipes = []
    for rank in range(2):
        reading, writing = os.pipe()
        if not os.fork():
            try:
                where = f"file://{tmp_path / 'meet'}"
                torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
                world = World(watts=100)
                world.works = rank == 0
                meter = world.meter()
                world.spend(2 + rank)
                meter.lap("train")
                os.write(writing, repr({k: tuple(v) for k, v in meter.take()[0].items()}).encode())
            finally:
                os._exit(0)
        pipes.append(reading)
    said = [os.read(reading, 1000).decode() for reading in pipes if os.wait()]
    assert said == [repr({"train": (5.0, 200.0, 3.0)})] * 2


# --------------------------------------------------------------------------------------------------------------- NVML


class NvmlError(Exception):
    pass


def nvml(monkeypatch, **functions) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    given = {
        "NVMLError": NvmlError, "nvmlInit": lambda: None, "nvmlDeviceGetMigMode": _refuse("Not Supported"),
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid, "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_000,
    }  # fmt: skip
    vars(module).update(given | functions)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1a2b-3c"))
    return module


def _refuse(text):
    def refuse(*_):
        raise NvmlError(text)

    return refuse


def test_the_counter_is_of_the_gpu_with_this_uuid(monkeypatch):
    asked = []
    nvml(monkeypatch, nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or 7,
         nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1000 + handle)  # fmt: skip
    counter = Counter(torch.device("cuda", 1))
    assert counter.read() == 1007 and asked == ["GPU-1a2b-3c"] and counter.reason == ""


@pytest.mark.parametrize(
    "functions, reason",
    [
        ({"nvmlInit": _refuse("Library Not Found")}, "1a2b-3c: Library Not Found"),
        ({"nvmlDeviceGetHandleByUUID": _refuse("Not Found")}, "1a2b-3c: Not Found"),
        ({"nvmlDeviceGetTotalEnergyConsumption": _refuse("Not Supported")}, "1a2b-3c: Not Supported"),
        ({"nvmlDeviceGetMigMode": lambda handle: (1, 1)}, "MIG instances"),
    ],
)
def test_no_counter_is_null_with_its_reason(monkeypatch, functions, reason):
    nvml(monkeypatch, **functions)
    counter = Counter(torch.device("cuda", 0))
    assert counter.read() is None and reason in counter.reason


def test_a_query_that_fails_later_is_null_that_time(monkeypatch):
    module = nvml(monkeypatch)
    counter = Counter(torch.device("cuda", 0))
    module.nvmlDeviceGetTotalEnergyConsumption = _refuse("Timeout")
    assert counter.read() is None and "Timeout" in counter.reason
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 13_000
    assert counter.read() == 13_000


def test_without_the_package_or_a_driver(monkeypatch):
    nvml(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'cmt-fast[energy]'" in Counter(torch.device("cuda", 0)).reason
    monkeypatch.undo()
    pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        nvml_less = types.SimpleNamespace(uuid="0-0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: nvml_less)
        counter = Counter(torch.device("cuda", 0))
        assert counter.read() is None and "NVML" in counter.reason


@pytest.mark.gpu
def test_on_a_gpu_the_parts_of_a_stretch_are_the_devices():
    device = torch.device("cuda", torch.cuda.current_device())
    meter = Meter.of(device)
    x = torch.randn(4096, 4096, device=device)
    x @ x
    meter.lap("startup")
    meter.take()
    for _ in range(20):
        x @ x
    with meter.within("stalled"):  # the host waits, the device has work left: nothing is stalled
        time.sleep(1e-4)
    with meter.within("teacher"):
        for _ in range(60):
            x @ x
    seconds = meter.lap("train")
    spent, _ = meter.take()
    assert sum(a.seconds for a in spent.values()) == pytest.approx(seconds)
    assert 2 < spent["teacher"].seconds / spent["train"].seconds < 4.5
    assert spent.get("stalled", Amount()).seconds < 0.1 * seconds
