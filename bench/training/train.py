"""Both digits recipes from noise to their report, side by side, and the figures that every stage ended with.

Each is `cmt train` in a process of its own, as a user runs it. Their logs are read while they run, so whoever is stopped early
has left the stages that it came to.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.results_file import Results
from bench.harness.timing import Deadline
from bench.harness.worker import environment, signal_name
from cmt_fast.storage import metrics_log

RECIPES = ("digits", "digits-mf")
SHORT = [
    "model.width=16", "model.depth=1", "model.heads=2", "eval.n=200", "eval.n_during=100",
    "pre.images_nimg=320", "pre.batch=32", "pre.warmup_nimg=0",
    "mid.images_nimg=320", "mid.batch=32", "mid.warmup_nimg=0", "mid.trajectories.pool_steps=4",
    "post.images_nimg=320", "post.batch=32", "post.trajectories.pool_steps=4",
    "control.images_nimg=320", "control.batch=32",
]  # fmt: skip
EVERY_S = 2.0
REPORT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="*", default=RECIPES, help="default digits and digits-mf")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="after which they are stopped")
    parser.add_argument("--tiny", action="store_true", help="a dry run: ten steps of every stage of a small network")
    parser.add_argument("--reports", type=Path, help="a folder for the pages")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-train.json")


class Training:
    """One `cmt train` under way."""

    def __init__(self, recipe: str, folder: Path, device: str, tiny: bool) -> None:
        self.recipe, self.folder, self.begun = recipe, folder / recipe, time.monotonic()
        command = [sys.executable, "-m", "cmt_fast", "train", recipe, "--out", str(self.folder), f"device={device}"]
        self.log = (folder / f"{recipe}.log").open("w")
        self.process = subprocess.Popen(
            [*command, *(SHORT if tiny else [])], env=environment(), stdout=self.log, stderr=subprocess.STDOUT
        )

    def row(self) -> dict[str, Any]:
        """How far it is: the last row of each kind that each stage logged, its distances by steps, the page."""
        stages: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*/metrics.jsonl"), key=lambda f: f.stat().st_ctime):
            stages[file.parent.name] = {row["kind"]: row for row in metrics_log.rows(file)}
        figures = {
            name: {k: {key: f.get(key) for key in ("frechet", "accuracy")} for k, f in last["eval"]["steps"].items()}
            for name, last in stages.items()
            if "eval" in last
        }
        return {
            "recipe": self.recipe, "exit": self.process.poll(), "seconds": time.monotonic() - self.begun,
            "report": (self.folder / REPORT).is_file(), "figures": figures, "stages": stages,
        }  # fmt: skip

    def said(self) -> str:
        """The end of what it printed."""
        lines = Path(self.log.name).read_text("utf-8", "replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:])[-400:]

    def stop(self) -> None:
        """It leaves a checkpoint if it can."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


def line(row: dict[str, Any]) -> str:
    """What a training came to."""
    figures = "; ".join(
        f"{name} " + ", ".join(f"{k}: {f['frechet']:.2f}" for k, f in by.items()) for name, by in row["figures"].items()
    )
    code = row["exit"]
    end = {None: "under way", 0: "done"}.get(code, signal_name(-code) if code and code < 0 else f"exit code {code}")
    return (
        f"{row['recipe']:10} {end} after {row['seconds']:.0f} s, report: {row['report']}; Frechet by steps: {figures}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, write the JSON as stages end; 1 if a recipe did not come to its report."""
    results = Results("train", arguments.device, arguments.json, tiny=arguments.tiny)
    results.plan(f"{recipe} to its report" for recipe in arguments.recipe)
    deadline = Deadline(arguments.minutes)
    with tempfile.TemporaryDirectory() as name:
        runs = [Training(recipe, Path(name), arguments.device, arguments.tiny) for recipe in arguments.recipe]
        try:
            while not deadline.over and any(r.process.poll() is None for r in runs):
                time.sleep(0.2 if arguments.tiny else EVERY_S)
                results["rows"] = [r.row() for r in runs]
                for row in results["rows"]:
                    if row["exit"] is not None:
                        results.done(f"{row['recipe']} to its report")
        finally:
            for r in runs:
                late = r.process.poll() is None
                said = r.said()
                r.stop()
                if late:
                    results.skip(f"{r.recipe} to its report", f"stopped at {said}")
            rows = [r.row() | ({} if r.process.returncode == 0 else {"said": r.said()}) for r in runs]
            results["rows"] = rows
            for r, row in zip(runs, rows):
                print(line(row), "" if row["exit"] == 0 else f"({row['said']})", flush=True)
                if row["report"] and arguments.reports:
                    arguments.reports.mkdir(parents=True, exist_ok=True)
                    shutil.copy(r.folder / REPORT, arguments.reports / f"{r.recipe}-report.html")
    print("written to", results.path)
    return int(not all(row["report"] and row["exit"] == 0 for row in results["rows"]))
