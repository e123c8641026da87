"""Readers of files that others may have written, fuzzed by atheris: only declared errors, and nothing but reading done.

    python -m bench fuzz --minutes 60 --processes 2        all targets, the minutes shared among them

Every target of targets.py runs in a process of its own, at low priority, from the files of seeds.py and those that found a
fault once. A case counts as a fault where the reader raises what it does not declare, a line that is none, takes more memory
or time than a file of its size may, or where the audit hook of guard.py saw something executed, opened for writing, started or
connected to. Executions and faults of all calls add up in bench/results/cpu/fuzz.json, each with the commit it ran; a fault's
case is kept beside it and goes to tests/fixtures/seeds once it is mended. Exits with 1 where this call found one.

The minutes are those of the processor: an hour by two processes takes half an hour on a machine that is not busy, and each
target costs half a minute more until everything is imported. tests/bench/test_fuzz.py holds the same against hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.harness.results_file import ROOT, about, write_json
from bench.safety.targets import TARGETS

RESULT = ROOT / "bench" / "results" / "cpu" / "fuzz.json"
START_S, WAIT = (
    1200,
    20,
)  # seconds to import torch in, and how much longer than its time a child may take, on a busy machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="of the processor, of all targets together")
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first target, 1 and more; by default another in each call"
    )
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what reached new lines, to go on from")
    parser.add_argument("--out", type=Path, default=RESULT)


def run(arguments: argparse.Namespace) -> int:
    try:
        import atheris  # noqa: F401
    except ImportError:
        print(
            "fuzz: atheris is not installed; pip install atheris==3.0.0 (Linux, Python 3.11 to 3.13)", file=sys.stderr
        )
        return 2
    known = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {"rows": [], "cases": []}
    rows, cases, found = {row["target"]: row for row in known["rows"]}, known["cases"], 0
    header = about("cpu")  # the commit that runs, whatever is committed meanwhile
    seed = arguments.seed or 1 + sum(row["calls"] for row in known["rows"])
    seconds = max(1, round(arguments.minutes * 60 / len(arguments.targets)))
    with tempfile.TemporaryDirectory(prefix="cmt-fuzz-") as folder, ThreadPoolExecutor(arguments.processes) as pool:
        base = arguments.corpus or Path(folder)
        jobs = {pool.submit(_one, t, seconds, base / t, seed + i): t for i, t in enumerate(arguments.targets)}
        for job in as_completed(jobs):  # who ends it before its time has what was done
            name, state = jobs[job], job.result()
            faults = _faults(name, state, base / name, arguments.out)
            rows[name] = added(rows.get(name, {}), name, state, header)
            cases, found = cases + [{**fault, "commit": header["commit"]} for fault in faults], found + len(faults)
            write(arguments.out, header, list(rows.values()), cases)
            for fault in faults:
                print(f"FAULT {fault['target']}: {fault['what']}: {fault['said']} (case {fault['case']})", flush=True)
    words = json.loads(arguments.out.read_text("utf-8"))
    print(
        f"{words['executions']} executions in {words['cpu_minutes']} processor minutes over {words['targets']} targets, "
        f"{found} faults now"
    )
    return 1 if found else 0


def _one(name: str, seconds: int, folder: Path, seed: int) -> dict[str, Any]:
    """What a child did, by its state.json; what ended it before its time is a fault too."""
    shutil.rmtree(folder / "faults", ignore_errors=True)
    (folder / "state.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.safety.fuzz_child", name, str(seconds), str(folder), str(seed)]
    memory = Path("/dev/shm")  # where files cost no disk
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with open(folder / "log", "wb") as log, tempfile.TemporaryDirectory(prefix="cmt-fuzz-", dir=where) as scratch:
        command += [scratch]
        child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, preexec_fn=lambda: os.nice(19) and None)
        try:
            code = child.wait(WAIT * seconds + START_S)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
    state = json.loads((folder / "state.json").read_text("utf-8")) if (folder / "state.json").is_file() else {}
    state = {"executions": 0, "read": 0, "refused": 0, "seconds": 0.0, "cpu_seconds": 0.0, "faults": {}, **state}
    if code or not state["executions"]:
        tail = (folder / "log").read_text("utf-8", "replace").splitlines()[-3:]
        left = next(iter(sorted(folder.glob("crash-*")) + sorted(folder.glob("timeout-*"))), None)
        state["faults"][f"the process ended with {code}"] = {
            "case": left.name if left else "",
            "said": " ".join(tail)[:300],
        }
    print(
        f"{name:<12}{state['executions']:>12,} executions  {state['seconds']:>6.0f} s  {len(state['faults'])} faults",
        flush=True,
    )
    return state


def _faults(name: str, state: dict[str, Any], folder: Path, out: Path) -> list[dict[str, str]]:
    """This call's faults of a target, their cases copied beside the results."""
    kept = []
    for what, known in state["faults"].items():
        case = folder / "faults" / known["case"]
        if known["case"] and case.is_file():
            (out.parent / "faults").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(case, out.parent / "faults" / f"{name}-{known['case']}")
        kept.append({"target": name, "what": what, **known})
    return kept


def added(row: dict[str, Any], name: str, state: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """A target's row with what one more call did."""
    numbers = {key: row.get(key, 0) + state[key] for key in ("executions", "read", "refused", "cpu_seconds")}
    numbers["seconds"] = round(row.get("seconds", 0.0) + state["seconds"], 1)
    commits = {**row.get("commits", {})}
    commits[str(header["commit"])] = commits.get(str(header["commit"]), 0) + state["executions"]
    faults = row.get("faults", 0) + len(state["faults"])
    return {"target": name, **numbers, "faults": faults, "calls": row.get("calls", 0) + 1, "commits": commits}


def write(path: Path, header: dict[str, Any], rows: list[dict[str, Any]], cases: list[dict[str, str]]) -> None:
    """The result file with its totals as text, which docs/safety/hostile.yaml fills its sentences from.

    cases: every fault that was ever found, with the commit in which it was.
    """
    total = {key: sum(row[key] for row in rows) for key in ("executions", "read", "refused", "seconds", "cpu_seconds")}
    now = str(header["commit"])
    words = {
        "executions": f"{total['executions']:,}",
        "cpu_minutes": f"{total['cpu_seconds'] / 60:.0f}",
        "targets": str(len(rows)),
        "faults": str(len(cases)),
        "executions_of_this_commit": f"{sum(row['commits'].get(now, 0) for row in rows):,}",
        "faults_of_this_commit": str(sum(case["commit"] == now for case in cases)),
    }
    rows = sorted(rows, key=lambda row: row["target"])
    write_json(path, {**header, **words, "total": total, "rows": rows, "cases": cases})
