"""The clock of op times on a GPU, with a stand-in for one: what lies between the events, and how long the GPU is kept waiting."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from bench.harness import results_file, timing
from bench.harness.results_file import Results
from bench.harness.timing import Timer


class Gpu:
    """Notes what is asked of it; an event's times are the device's, in ms."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sleeps: list[float] = []

    def Event(self, enable_timing: bool) -> Gpu:
        assert enable_timing
        return self

    def record(self) -> None:
        self.said.append("event")

    def synchronize(self) -> None:
        self.said.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.said.append("sleep")
        self.sleeps.append(cycles / Timer.CYCLES_MS)

    def elapsed_time(self, _: Gpu) -> float:
        return 3.0


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Gpu]:
    timing._flush.cache_clear()
    fake, empty = Gpu(), torch.empty
    for name in ("Event", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))

    def flush(*size, **options):
        assert options.pop("device") == "cuda" and size[0] == Timer.BYTES > 60 * 2**20  # an H200's L2 cache
        buffer = empty(1, **options)
        monkeypatch.setattr(type(buffer), "zero_", lambda self: fake.said.append("flush"), raising=False)
        return buffer

    monkeypatch.setattr(timing.torch, "empty", flush)
    yield fake
    timing._flush.cache_clear()


def test_the_call_is_issued_while_the_gpu_waits_on_an_empty_cache(gpu, passing):
    timer = Timer(lambda: gpu.said.append("call"), "cuda")
    assert timer() == 3.0
    assert gpu.said == ["wait", "flush", "sleep", "event", "call", "event", "wait"]
    assert timer.host_ms[0] < Timer.SHORTEST_MS and not timer.host_bound


@pytest.fixture
def passing(monkeypatch):
    """passing(ms): so much time passes, by the only clock that there is."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda ms: now.__setitem__(0, now[0] + 1e-3 * ms)


def test_a_call_that_outlasts_the_wait_is_timed_again_with_a_longer_one(gpu, passing):
    timer = Timer(lambda: passing(5), "cuda")
    timer()
    assert gpu.sleeps == pytest.approx([0.1, 7.5]) and timer.host_ms == pytest.approx([5]) and not timer.host_bound
    timer()
    assert gpu.sleeps == pytest.approx([0.1, 7.5, 7.5])


def test_a_call_that_waits_for_the_gpu_is_host_bound(gpu, passing):
    timer = Timer(lambda: passing(1 + 2 * gpu.sleeps[-1]), "cuda")
    timer()
    assert timer.host_bound and len(gpu.sleeps) == 4


def test_results_are_whole_after_every_row(tmp_path):
    results = Results("x", "cpu", tmp_path / "deep" / "x.json", tiny=True)
    results.plan(["a", "b"])
    for i in range(3):
        results.add({"i": i})
        assert [row["i"] for row in json.loads(results.path.read_text())["rows"]] == list(range(i + 1))
    results.done("a")
    results.skip("b", "no time")
    assert json.loads(results.path.read_text())["not_measured"] == ["b: no time"]
    assert [f.name for f in results.path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("name", "folder"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA L40S", "nvidia-l40s")]
)
def test_the_folder_of_a_card(name, folder):
    assert results_file.slug("cuda", name) == folder and results_file.slug("cpu", name) == "cpu"
