"""What a restart reads and computes before its first step, and how long a save stops the steps; before and after, and counted up.

`cmt train` goes on with a stage that has a parent, which is its teacher too, on 1, 2 and 4 CPU processes. Counted are bytes of
checkpoints that are hashed, and those that are mapped besides, and the processor time of all ranks up to the first step. A save's
stall is the time in which the loop takes no step. `--before TREE` measures a checkout of an earlier commit by the same script.
An XXL's figures are those copies of the weights times its 6.1 GB: bytes by arithmetic, seconds by the speeds measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness.results_file import ROOT, Results
from cmt_fast.storage import tensor_file

XXL_BYTES, XXL_RANKS = 6.1e9, 8  # one fp32 copy of EDM2-XXL's weights; ranks that it is trained on
STEPS, BATCH, APART = 24, 4, 4  # of a stage; between saves that are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--before", type=Path, metavar="TREE", help="a checkout of an earlier commit, measured too")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    parser.add_argument("--width", type=int, default=512, help="of the network; 512 makes a checkpoint of 440 MB")
    parser.add_argument("--rounds", type=int, default=3, help="restarts of each kind; the median counts")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/cpu/<date>-restart.json")


def overrides(width: int, every: int) -> list[str]:
    """Stages of a few steps, saved after `every` of them; nothing is judged and hardly anything drawn."""
    out = ["device=cpu", f"model.width={width}", "model.depth=6", "model.heads=4", "sampler.teacher_steps=2"]
    for name in ("pre", "mid"):
        out += [f"{name}.images_nimg={STEPS * BATCH}", f"{name}.batch={BATCH}", f"{name}.warmup_nimg=0"]
        out += [f"{name}.checkpoint_every_nimg={every * BATCH}"]
        out += [f"{name}.eval_every_nimg=null", f"{name}.grid_every_nimg=null"]
    return [*out, "mid.trajectories.pool_steps=4", "--stages", "pre,mid"]


def launch(tree: Path, processes: int, job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Do a job in a group of processes that import a tree; what each rank found, in order. Raises RuntimeError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder / "job.json").write_text(json.dumps(job | {"found": str(folder / "found")}), "utf-8")
    path = f"{tree}{os.pathsep}{tree / 'kernels'}"
    children = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CMT_KERNELS": "reference",
            **{k: str(v) for k, v in group.items()},
        }
        command = [sys.executable, str(Path(__file__).with_name("restart_rank.py")), str(folder / "job.json")]
        out = (folder / f"rank-{rank}.log").open("w")
        children.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=folder))
    codes = [child.wait(600) for child in children]
    if any(codes):
        raise RuntimeError(f"{codes}: {(folder / 'rank-0.log').read_text('utf-8')[-2000:]}")
    return [json.loads((folder / f"found.{rank}").read_text("utf-8")) for rank in range(processes)]


def restarts(tree: Path, worlds: list[int], run: Path, text: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of processes: bytes read and processor seconds until the first step, of all ranks."""
    rows = []
    for n in worlds:
        seconds, found = [], []
        for _ in range(rounds):
            again = run.with_name("again")
            shutil.copytree(run, again, copy_function=os.link)
            arguments = ["train", "digits", *text, "--out", str(again)]
            found = launch(tree, n, {"do": "start", "arguments": arguments}, run.parent)
            seconds.append(sum(rank["cpu_s"] for rank in found))
            shutil.rmtree(again)
        rows.append(
            {"processes": n, "cpu_s": statistics.median(seconds), "each_cpu_s": seconds,
             **{key: [rank[key] for rank in found] for key in ("hashed", "mapped", "rchar")}}
        )  # fmt: skip
    return rows


def stalls(tree: Path, run: Path, text: list[str]) -> dict[str, Any]:
    """Seconds of wall time, and of the loop's own processor time, in which a save stops the steps; of those before the last."""
    again = run.with_name("again")
    shutil.copytree(run, again, copy_function=os.link)
    (found,) = launch(
        tree, 1, {"do": "train", "arguments": ["train", "digits", *text, "--out", str(again)]}, run.parent
    )
    shutil.rmtree(again)
    saves = [row for row in found["saves"] if not row["last"]]
    return {"wall_s": [row["wall_s"] for row in saves], "cpu_s": [row["cpu_s"] for row in saves],
            "peak_bytes": found["peak_bytes"]}  # fmt: skip


def speed(file: Path) -> float:
    """Processor seconds to read and hash a GB of a file that the system has in memory, the median of five."""
    size, seconds = file.stat().st_size, []
    for _ in range(5):
        tensor_file._hashed.clear()
        begun = time.process_time()
        tensor_file.checksum(file)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds) / size * 1e9


def counted(
    name: str, rows: list[dict[str, Any]], save: dict[str, Any], copy_bytes: int, each_gb_s: float
) -> dict[str, Any]:
    """An XXL on eight ranks: the copies of the weights that the first rank and each other one hash, by its size."""
    first, *others = [n / copy_bytes for n in rows[-1]["hashed"]]
    other = others[0] if others else first
    total = (first + other * (XXL_RANKS - 1)) * XXL_BYTES
    stall = statistics.median(save["wall_s"]) * XXL_BYTES / copy_bytes
    return {"name": name, "first_copies": first, "other_copies": other, "hashed_bytes": total,
            "cpu_s": total / 1e9 * each_gb_s, "stall_s": stall}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the figures, write the JSON."""
    worlds, text = [int(n) for n in arguments.worlds.split(",")], overrides(arguments.width, APART)
    results = Results("restart", "cpu", arguments.json, width=arguments.width, xxl_bytes=XXL_BYTES, xxl_ranks=XXL_RANKS)
    trees = {"before": arguments.before, "after": ROOT} if arguments.before else {"after": ROOT}
    results.plan(trees)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "run"
        # its second stage saved half-way and at its end, which is taken away
        first = [*overrides(arguments.width, STEPS // 2), "--out", str(whole)]
        launch(arguments.before or ROOT, 1, {"do": "train", "arguments": ["train", "digits", *first]}, folder)
        for late in sorted((whole / "mid" / "checkpoints").glob("step-*"))[1:]:
            shutil.rmtree(late)
        of = {f.name: f.stat().st_size for f in next((whole / "mid" / "checkpoints").iterdir()).glob("*.safetensors")}
        copy = of["ema-0.safetensors"]
        results["files"], results["copy_bytes"] = of, copy
        results["hash_s_per_gb"] = speed(next((whole / "mid" / "checkpoints").glob("*/ema-0.safetensors")))
        for label, tree in trees.items():
            at = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True
            ).stdout
            rows = restarts(tree, worlds, whole, text, arguments.rounds)
            saves = {"background": stalls(tree, whole, text)}
            if label == "after":
                saves["waiting"] = stalls(tree, whole, [*text, "saves=waiting"])
            results.add({"name": label, "commit": at.strip(), "restart": rows, "save": saves})
            xxl = counted(label, rows, saves["background"], copy, results["hash_s_per_gb"])
            results["xxl"] = [*results.data.get("xxl", []), xxl]
            for row in rows:
                print(
                    f"{label:>7} {row['processes']} process(es): hashed {[round(n / copy, 2) for n in row['hashed']]} copies, "
                    f"mapped {[round(n / copy, 2) for n in row['mapped']]}, {row['cpu_s']:.2f} CPU s to the first step"
                )
            for kind, save in saves.items():
                walls = ", ".join(f"{s:.3f}" for s in save["wall_s"])
                print(
                    f"{label:>7} a save, {kind}: {walls} s without a step; peak {save['peak_bytes'] / 1e6:,.0f} MB",
                    flush=True,
                )
            results.done(label)
    print("written to", results.path)
    return 0
