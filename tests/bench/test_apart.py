"""Contenders in processes of their own: what does not fit is halved, what dies or hangs is named, none takes another along."""

from __future__ import annotations

import argparse
import json
import os
import sys

import pytest

from bench.harness.worker import Died, Late, Refused, Worker
from bench.training import step
from bench.training.apart import Side, first_of_peer
from tests.fixtures import forked

# planted in a worker before it serves: the peer's loss at more than so many rows
BENEATH = """
import os, signal, sys, time, torch
from bench.harness import worker
from bench.training import baseline as peer, runs
real = peer.Step.loss
def loss(self):
    if self.stage.batch > {rows}:
        {fault}
    return real(self)
peer.Step.loss = loss
worker.serve(sys.argv[1])
"""
FULL = "raise torch.OutOfMemoryError('planted: no room')"
KEPT = "peer.kept = self.data.x.double(); raise torch.OutOfMemoryError('planted: and never freed')"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGING = "time.sleep(600)"
WRONG = "raise ValueError('planted: not memory')"


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Workers that have imported already; `test_a_worker_says_how_it_ended` starts one as a bench does."""
    monkeypatch.setattr(Worker, "python", staticmethod(lambda: [*forked.python(), "-m", "bench.harness.worker"]))


@pytest.fixture
def plant(monkeypatch):
    """plant(fault, rows): the peer's step has this fault at more than so many rows."""

    def plant(fault: str, rows: int) -> None:
        script = BENEATH.format(fault=fault, rows=rows)
        monkeypatch.setattr(Worker, "python", staticmethod(lambda: [*forked.python(), "-c", script]))

    return plant


def bench(tmp_path, *options: str) -> tuple[int, dict]:
    """`bench step --tiny --apart`: its exit code and its file."""
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    where = tmp_path / "step.json"
    small = ["--device", "cpu", "--tiny", "--apart", "--no-compile", "--seconds", "0", "--json", str(where)]
    code = step.run(parser.parse_args([*small, *options]))
    return code, json.loads(where.read_text())


def by_how(data: dict, objective: str) -> dict[str, dict]:
    return {row["how"]: row for row in data["rows"] if row["objective"] == objective}


def test_an_objective_has_ours_the_peer_and_a_ratio_at_equal_batch(tmp_path):
    code, data = bench(tmp_path, "--objective", "CMT-MF")
    assert code == 0 and data["not_measured"] == []
    rows = by_how(data, "CMT-MF")
    assert rows["eager"]["batch"] == rows["peer"]["batch"] == 16
    assert "1 alternating rounds, two processes" in rows["eager"]["over_peer_by"]
    assert rows["eager"]["over_peer"]["fp32"]["p50"] > 0 and rows["eager"]["shipped"]
    assert rows["peer"]["saved_mb"] > rows["eager"]["saved_mb"] > 0
    assert rows["eager, recipe's points"]["teacher_forwards"] == 4.0
    assert "one process after the other" in rows["eager, recipe's points"]["over_peer_by"]


@pytest.mark.parametrize("fault", [FULL, KILLED], ids=["out of memory", "killed by the system"])
def test_what_does_not_fit_is_halved_and_set_beside_ours_at_that_batch(tmp_path, plant, fault):
    plant(fault, rows=4)
    names = ("MF", "FM") if fault == FULL else ("FM",)
    code, data = bench(tmp_path, *(f"--objective={name}" for name in names))
    assert code == 0 and data["not_measured"] == []
    for name in names:
        peer = by_how(data, name)["peer"]
        assert (peer["batch"], peer["too_large"]) == (4, [16, 8])
        ours = {r["batch"]: r for r in data["rows"] if r["objective"] == name and r["how"] == "eager"}
        assert set(ours) == {16, 4}
        assert "alternating" in ours[4]["over_peer_by"] and "after the other" in ours[16]["over_peer_by"]
        scale = ours[16]["over_peer"]["fp32"]["p50"] * ours[16]["p50_ms"] / peer["p50_ms"]
        assert scale == pytest.approx(16 / 4)


def test_a_contender_that_fails_has_its_reason_and_ours_their_rows(tmp_path, plant):
    plant(WRONG, rows=0)
    code, data = bench(tmp_path, "--objective", "MF", "--objective", "FM")
    assert code == 1
    for name in ("MF", "FM"):
        rows = by_how(data, name)
        assert rows["peer"]["cannot"] == "ValueError: planted: not memory" and rows["eager"]["p50_ms"] > 0
    assert data["not_measured"] == ["MF dry eager beside the peer", "FM dry eager beside the peer"]


def test_a_contender_that_hangs_is_ended_and_named(tmp_path, plant, monkeypatch):
    plant(HANGING, rows=0)
    real = Worker.ask

    def ask(self, message, timeout_s):
        self.peer = message.get("how") == "peer" or getattr(self, "peer", False)
        return real(self, message, 3.0 if self.peer and message["do"] == "fit" else timeout_s)

    monkeypatch.setattr(Worker, "ask", ask)
    code, data = bench(tmp_path, "--objective", "FM")
    assert code == 0 and [row["how"] for row in data["rows"]] == ["eager"]
    assert data["not_measured"] == ["FM dry eager beside the peer", "FM dry peer: batch 16, no answer in 3 s"]


FIRST = [(128, "cuda", 32), (64, "cuda", 16), (32, "cuda", 16), (8, "cuda", 8), (64, "cpu", 64), (8, "cpu", 8)]


@pytest.mark.parametrize("batch, device, first", FIRST)
def test_the_peer_begins_at_no_larger_a_batch_than_ours(batch, device, first):
    assert first_of_peer(batch, device) == first


def side() -> Side:
    from bench.harness.timing import Deadline
    from bench.training import runs

    return Side(
        runs.model("dry"),
        argparse.Namespace(device="cpu", tiny=True, seconds=0.0, graph=False, stream=False),
        Deadline(2.0),
    )


def test_memory_that_stays_taken_after_a_fault_costs_the_process(plant, monkeypatch):
    """What cannot be freed: the held bytes are a planted figure here, as a CPU does not say."""
    script = BENEATH.format(fault=KEPT, rows=4).replace(
        "worker.serve", "from bench.training import contender\n"
        "contender.held_bytes = lambda device: 10**9 if hasattr(peer, 'kept') else 0\nworker.serve",
    )  # fmt: skip
    monkeypatch.setattr(Worker, "python", staticmethod(lambda: [*forked.python(), "-c", script]))
    one = side()
    one.load("FM", "peer", "fp32")
    first = one.worker.process.pid
    assert one.fit(16)["batch"] == 4
    assert one.worker.process.pid != first
    one.close()


def test_a_worker_says_how_it_ended(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(Refused, match="KeyError"):
        Worker("bench.training.contender").ask({"do": "nothing"}, 60)
    for end, said in (("os._exit(7)", "ended with exit code 7"), ("os.kill(os.getpid(), 11)", "killed by SIGSEGV")):
        worker = dead(end)
        with pytest.raises(Died, match=said):
            worker.ask({}, 60)
    worker = dead("import time; time.sleep(600)")
    with pytest.raises(Late, match="no answer in 0 s"):
        worker.ask({}, 0.2)
    assert worker.process.poll() is not None


def dead(end: str) -> Worker:
    class Other(Worker):
        @staticmethod
        def python() -> list[str]:
            return [sys.executable, "-c", f"import os, sys; sys.stdin.readline(); {end}"]

    return Other("x", env=dict(os.environ))
