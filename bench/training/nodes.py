"""Two machines on one: docker/slurm/train.sbatch as it is, with an `srun` that starts one torchrun a "node" on localhost.

One small run on a store of latents is trained by two nodes of two CPU processes, again and again: never stopped; with a rank
killed (torchrun starts the group again); with a node killed, agent and ranks at once (the job ends as on NODE_FAIL, and is run
again as SLURM's --requeue does); and asked to stop as its time is up (SIGUSR1), then gone on with by as many, or by one node and
then by two nodes of four processes. Of each: its jobs, the steps at which it went on, and how far its weights are from those of
the run that was never stopped. Each node has a CMT_STORE_CACHE of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import results_file
from bench.harness.results_file import ROOT
from cmt_fast.storage import checkpoint

TARGET = ROOT / "bench" / "results" / "cpu" / "nodes.json"
STEPS, BATCH, EVERY = 120, 32, 20  # of the run; a checkpoint every 20 steps
SEEN = 40  # steps after which something happens to it
PATIENCE_S = 300
RECIPE = [
    str(ROOT / "docker" / "mini.yaml"), "--stages", "pre", "device=cpu", f"pre.images_nimg={STEPS * BATCH}", f"pre.batch={BATCH}",
    f"pre.checkpoint_every_nimg={EVERY * BATCH}", "pre.eval_every_nimg=null", "pre.grid_every_nimg=null", "eval.n=32",
]  # fmt: skip
SRUN = """#!{python}
import os, signal, subprocess, sys, time
nodes = []
for i in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    near = os.path.abspath(f"near-{{i}}")
    os.makedirs(near, exist_ok=True)
    log = open(f"node-{{i}}.log", "a")
    nodes.append(subprocess.Popen(sys.argv[2:], stdout=log, stderr=log, env=os.environ | {{"CMT_STORE_CACHE": near}}))
open("agents", "w").write(" ".join(str(p.pid) for p in nodes))
signal.signal(signal.SIGTERM, lambda *_: [p.send_signal(signal.SIGTERM) for p in nodes if p.poll() is None])
while any(p.poll() is None for p in nodes) and not any(p.poll() for p in nodes):
    time.sleep(0.1)
end = time.monotonic() + 60  # --kill-on-bad-exit, as srun does: TERM, then KILL
bad = any(p.poll() for p in nodes)
for p in nodes:
    if bad and p.poll() is None:
        p.terminate()
for p in nodes:
    try:
        p.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        p.kill()
sys.exit(max(abs(p.wait()) for p in nodes))
"""
SCONTROL = '#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> requeued\necho localhost\n'


class Job(NamedTuple):
    """A submission: nodes, processes of each, and what happens after SEEN more steps: nothing, `rank`, `node`, `time`."""

    nodes: int
    each: int
    happens: str = ""


# what a run lives through; its name as the page has it
LIVES: dict[str, list[Job]] = {
    "never stopped": [Job(2, 2)],
    "a rank killed": [Job(2, 2, "rank")],
    "a node killed, the job run again": [Job(2, 2, "node"), Job(2, 2)],
    "time up, gone on with by as many": [Job(2, 2, "time"), Job(2, 2)],
    "time up twice: 4, then 2, then 8 ranks": [Job(2, 2, "time"), Job(1, 2, "time"), Job(2, 4)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--life", action="append", choices=list(LIVES), help="default: all of them")
    parser.add_argument("--folder", type=Path, help="where the runs are; kept (default: a temporary one)")


def run(arguments: argparse.Namespace) -> int:
    """Live all lives, beside the first. 1 where one did not end."""
    from tests.fixtures.stores import make_store

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        world(folder)
        make_store(folder / "store", n=2000, shard=500)
        wanted = dict.fromkeys(["never stopped", *(arguments.life or LIVES)])
        rows = []
        for name in wanted:
            rows.append(lived(folder, name, LIVES[name]))
            print(rows[-1], flush=True)
        whole = weights(folder / rows[0]["folder"])
        for row in rows:
            row["relative_difference"] = distance(whole, weights(folder / row.pop("folder")))
            print(row, flush=True)
    results = {**results_file.about("cpu"), "steps": STEPS, "batch": BATCH, "rows": rows}
    results_file.write_json(TARGET, results)
    return 0


def world(folder: Path) -> None:
    """What a job finds: the commands that SLURM has."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def lived(folder: Path, name: str, jobs: list[Job]) -> dict[str, Any]:
    """One run through all its jobs. Raises RuntimeError where one does not end as it should."""
    out = re.sub(r"\W+", "-", name)
    for path in folder.glob("near-*"):
        shutil.rmtree(path)  # every life begins on new machines
    for path in (folder / "requeued", *folder.glob("node-*.log")):
        path.unlink(missing_ok=True)
    began = time.monotonic()
    for n, job in enumerate(jobs):
        code = submitted(folder, out, job, n)
        if code != (1 if job.happens == "node" else 0) and not (job.happens == "node" and code):
            raise RuntimeError(f"{name}: job {n} ended with {code}\n" + (folder / "node-0.log").read_text()[-3000:])
    log = (folder / "node-0.log").read_text()
    done = checkpoint.complete(folder / out / "pre").manifest
    return {
        "life": name,
        "jobs": [job._asdict() for job in jobs],
        "steps": done["step"],
        "resumed_at": [int(s.replace(",", "")) for s in re.findall(r"resumes at step ([\d,]+)", log)],
        "requeued": len((folder / "requeued").read_text().split()) if (folder / "requeued").exists() else 0,
        "copies": sorted(p.name for p in folder.glob("near-*/*") if p.is_dir()),
        "wall_s": round(time.monotonic() - began, 1),
        "folder": out,
    }


def submitted(folder: Path, out: str, job: Job, restarts: int) -> int:
    """Run the batch script, and do to it what happens. Its exit code."""
    (folder / "agents").unlink(missing_ok=True)
    more = {"SLURM_JOB_ID": f"{os.getpid()}", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "localhost"}
    size = {"SLURM_JOB_NUM_NODES": str(job.nodes), "SLURM_GPUS_PER_NODE": str(job.each), "PORT": str(_port())}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = f"{ROOT}:{ROOT / 'kernels'}"
    environment = os.environ | more | size | {"PATH": path, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "docker/slurm/train.sbatch"), *RECIPE, "--out", out]
    begun = newest(folder / out)
    batch = subprocess.Popen(command, cwd=folder, env=environment)
    end, happens = time.monotonic() + PATIENCE_S, job.happens
    while batch.poll() is None:
        if time.monotonic() > end:
            batch.terminate()
            raise RuntimeError(f"{out}: has not ended after {PATIENCE_S} s")
        if happens and newest(folder / out) >= begun + SEEN:
            happen(folder, batch.pid, happens)
            happens = ""
        time.sleep(0.02)
    return batch.returncode


def happen(folder: Path, batch: int, what: str) -> None:
    """Kill the last rank, kill the last node, or let the time be up."""
    agent = int((folder / "agents").read_text().split()[-1])
    if what == "time":
        return os.kill(batch, signal.SIGUSR1)
    ranks = children(agent)
    for pid in ranks[-1:] if what == "rank" else [agent, *ranks]:
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that a process started, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


def newest(out: Path) -> int:
    """Steps of the newest checkpoint of a run, 0 without one."""
    names = [re.search(r"(\d+)$", p.parent.name) for p in (out / "pre" / "checkpoints").glob("step-*/manifest.json")]
    return max((int(m[1]) for m in names if m), default=0)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The EMA that a finished run ended with."""
    from safetensors.torch import load_file

    return load_file(checkpoint.complete(out / "pre").folder / "ema-0.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, over the largest weight of its tensor; 0 where all bits are equal."""
    return max(
        float((a[k].double() - b[k].double()).abs().max() / a[k].double().abs().max().clamp_min(1e-30)) for k in a
    )


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
