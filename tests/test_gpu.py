"""`make gpu` without a GPU: every part is a command that exists, none takes another's rows along, what is missing is named."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from bench.__main__ import BENCHES
from bench.harness import gpu_suite
from bench.harness.gpu_suite import runner
from bench.harness.gpu_suite.parts import PARTS, Part, Sitting
from tests.fixtures import forked

ROOT = Path(__file__).parent.parent

# what a planted part does after the two rows that it has written
ENDS = {
    "sound": "results.done('all of it')",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raising": "raise ValueError('planted')",
    "full": "raise torch.OutOfMemoryError('planted')",
    "greedy": "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); torch.empty(2**36)",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); child = subprocess.Popen(['sleep', '600']); "
    "print('child', child.pid, flush=True); time.sleep(600)",
}
SCRIPT = """
import os, pathlib, resource, signal, subprocess, sys, time
import torch
from bench.harness.results_file import Results
results = Results("planted", "cpu", pathlib.Path(sys.argv[1]))
results.plan(["all of it"])
results.add({{"name": "first"}})
results.add({{"name": "second"}})
{end}
"""


def planted(name: str, beside: bool = False) -> Part:
    command = lambda s, part, minutes: ["-c", SCRIPT.format(end=ENDS[name]), str(s.file(part))]
    return Part(name, 10, (), command, beside)


def sit(tmp_path: Path, parts: list[Part], minutes: float = 5.0) -> dict:
    """Run parts; the summary that is on disk in the bundle, and every part's rows in it."""
    sitting = Sitting("cpu", True, tmp_path / "work", tmp_path / "scratch")
    for folder in (sitting.scratch, tmp_path / "out"):
        folder.mkdir()
    facts = {"device": "a card", "torch": "0", "commit": None, "tiny": False, "minutes": minutes, "slug": "card"}
    files = runner.Files(facts, sitting.results, tmp_path / "log", tmp_path / "out")
    runner.run(parts, sitting, minutes, files, {part.name: [] for part in parts})
    return json.loads((tmp_path / "out" / "gpu.json").read_text())


@pytest.mark.parametrize("beside", [False, True])
def test_what_dies_leaves_its_rows_and_the_others(tmp_path, beside, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked.executable("torch"))
    names = ["killed", "raising", "full", "greedy", "sound"]
    bundle = sit(tmp_path, [planted(name, beside) for name in names])
    table = bundle["summary"]["parts"]
    assert {n: p["status"] for n, p in table.items()} == {
        "killed": "killed by SIGKILL",
        "raising": "FAILED, exit code 1",
        "full": "FAILED, exit code 1",
        "greedy": "FAILED, exit code 1",
        "sound": "ok",
    }
    for name in names:
        assert [row["name"] for row in bundle["results"][name]["rows"]] == ["first", "second"], name
        assert table[name]["not_measured"] == ([] if name == "sound" else ["all of it"]), name
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert "[raising] ValueError: planted" in log and "[full] torch.OutOfMemoryError: planted" in log
    assert re.search(r"\[greedy\] .*can't allocate memory", log)


def test_a_part_past_its_limit_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    parts = [planted("deaf"), planted("sound")]
    bundle = sit(tmp_path, [parts[0]._replace(seconds=12), parts[1]._replace(seconds=60)], minutes=72 / 60)
    deaf, sound = (bundle["summary"]["parts"][name] for name in ("deaf", "sound"))
    assert re.fullmatch("stopped at its limit of 1[12] s", deaf["status"]) and deaf["rows"] == 2
    child = int(re.search(r"\[deaf\] child (\d+)", (tmp_path / "out" / "gpu.log").read_text())[1])
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text(encoding="utf-8").split(") ")[1][0] == "Z"
    assert sound["status"] == "ok" and sound["limit_s"] > 50


def test_time_that_is_left_over_flows_on(tmp_path):
    bundle = sit(tmp_path, [planted("killed"), planted("sound")], minutes=2.0)
    first, last = bundle["summary"]["parts"].values()
    assert first["limit_s"] == pytest.approx(60, abs=1)
    assert last["limit_s"] == pytest.approx(120 - first["seconds"], abs=2)


def test_a_sitting_that_is_ended_ends_its_parts_and_keeps_their_rows(tmp_path):
    script = f"""
import sys; from pathlib import Path
from tests.test_gpu import planted, sit
print("begun", flush=True)
sit(Path({str(tmp_path)!r}), [planted("deaf"), planted("sound")])
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    sitting = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    end, log = time.monotonic() + 60, tmp_path / "log"
    while not (log.exists() and "child" in log.read_text()):
        assert time.monotonic() < end and sitting.poll() is None
        time.sleep(0.1)
    sitting.send_signal(signal.SIGTERM)
    assert sitting.wait(30) != 0
    bundle = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert bundle["summary"]["parts"]["deaf"]["status"] == "stopped with the sitting"
    assert bundle["summary"]["parts"]["sound"]["status"] == "NOT RUN: no time left"
    assert len(bundle["results"]["deaf"]["rows"]) == 2
    child = int(re.search(r"child (\d+)", log.read_text())[1])
    time.sleep(0.2)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text(encoding="utf-8").split(") ")[1][0] == "Z"


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_parses(name, tiny, tmp_path):
    _, module, *rest = PARTS[name].command(Sitting("cpu", tiny, tmp_path, tmp_path), name, 1.0)
    assert module in ("bench", "pytest")
    assert str(tmp_path / f"{name}.json") in rest
    if module == "bench":
        assert rest[0] in BENCHES
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"bench.{BENCHES[rest[0]][0]}").add_arguments(parser)
        assert parser.parse_args(rest[1:]).minutes in (None, 1.0)


def test_a_sitting_is_planned_for_the_minutes_that_it_has():
    together = [
        max(part.seconds for part in parts) for parts in runner.rounds([p for p in PARTS.values() if p.sitting])
    ]
    assert sum(together) == 60 * gpu_suite.MINUTES
    assert [[p.name for p in parts] for parts in runner.rounds(list(PARTS.values()))][:2] == [
        ["tests", "sweep", "train"],
        ["calibrate"],
    ]


def test_a_missing_package_stops_its_part_alone_and_is_named(tmp_path, monkeypatch, capsys):
    there = {"killed": planted("killed"), "sound": planted("sound"), "lacking": planted("sound")}
    there["lacking"] = there["lacking"]._replace(name="lacking", needs=("no_such_package",))
    for name in list(PARTS):
        monkeypatch.delitem(PARTS, name)
    for name, part in there.items():
        monkeypatch.setitem(PARTS, name, part)
    monkeypatch.setenv("OUT", str(tmp_path))
    options = partial(argparse.Namespace, device="cpu", tiny=True, minutes=5.0, unpack=None)
    assert gpu_suite.run(options(part=["sound"])) == 0
    assert gpu_suite.run(options(part=[])) == 1
    said = capsys.readouterr().out
    assert "lacking       NOT RUN: needs no_such_package" in said and "killed        killed by SIGKILL" in said
    assert "not measured: all of it" in said
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]
    with pytest.raises(SystemExit, match="'oops' is not valid; valid are killed, sound, lacking"):
        gpu_suite.run(options(part=["oops"]))


def test_a_sitting_elsewhere_is_unpacked_beside_what_is_there(tmp_path):
    facts = {"slug": "h100", "tiny": False, "device": "NVIDIA H100"}
    for name, status in (("step", "ok"), ("ops", "killed by SIGKILL")):
        bundle = {"summary": facts | {"parts": {name: {"status": status}}}, "results": {name: {"rows": [name]}}}
        (tmp_path / "gpu.json").write_text(json.dumps(bundle))
        gpu_suite.unpack(tmp_path / "gpu.json", tmp_path / "results")
    folder = tmp_path / "results" / "h100"
    assert sorted(f.name for f in folder.iterdir()) == ["ops.json", "step.json", "summary.json"]
    assert json.loads((folder / "step.json").read_text())["rows"] == ["step"]
    assert set(json.loads((folder / "summary.json").read_text())["parts"]) == {"step", "ops"}
    (tmp_path / "gpu.json").write_text(json.dumps({"summary": facts | {"tiny": True}, "results": {}}))
    with pytest.raises(SystemExit, match="dry run"):
        gpu_suite.unpack(tmp_path / "gpu.json", tmp_path / "results")


def test_the_makefile_names_parts_that_exist():
    named = set(re.findall(r"gpu-([\w-]+)", (ROOT / "Makefile").read_text())) - {"dry", "kit"}
    assert named and named <= set(PARTS)


def test_no_gpu_is_said_at_once():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device; `make gpu-dry`"):
        gpu_suite.run(argparse.Namespace(part=[], device="cuda", tiny=False, minutes=1.0, unpack=None))
