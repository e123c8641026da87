"""Signals to every kind of command, at every kind of moment: exit code, seconds to the end, what is said, what is on disk.

A case is a command in a process of its own, most forked from this one with their imports done, that is sent one signal or
more when it is where the case wants it, and is made slow there (it sleeps between batches), so that who does not look between
batches is late. Training has to end within 20 s with a checkpoint of the last step that it had taken; the same command then
goes on and ends with the bits of a run that nobody disturbed. What is no training ends with 128 + signal and one line. A
traceback fails every case. All 56 take 80 CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from safetensors.torch import save_file

from bench.harness import results_file
from bench.safety import kills
from bench.safety.kills import STEP
from bench.safety.sent import HUP, INT, STOPS, TERM, USR1, Case, ended, sent, started
from cmt_fast.evaluation.features import Classifier
from cmt_fast.runtime import exits
from cmt_fast.storage import checkpoint

TARGET = results_file.ROOT / "bench" / "results" / "cpu" / "signals.json"
WITHIN_S = 20.0  # from the signal to the end
# 30 batches of an evaluation, and as many parts of a round
MORE = ["eval.batch=1", "eval.n=30", "eval.n_during=30", "mid.trajectories.rollout_batch=1"]
MORE += [f"{stage}.images_nimg={16 * kills.BATCH}" for stage in ("pre", "mid")]


TRAINING = [Case("train", at, (n,)) for at in ("start", "step", "save", "evaluation", "rollouts") for n in STOPS]
TWICE = [
    Case("train", at, pair)
    for at, pair in (
        ("step", (INT, INT)), ("step", (INT, TERM)), ("save", (TERM, TERM)), ("evaluation", (HUP, TERM)),
        ("rollouts", (USR1, INT)), ("evaluation", (INT, INT, INT, TERM)),
    )
]  # fmt: skip
OTHERS = [
    Case(what, at, (n,))
    for what, at in (("import", "start"), ("eval", "evaluation"), ("report", "evaluation"), ("sample", "sampling"),
                     ("trajectories", "rollouts"), ("watch", "waiting"))
    for n in (INT, TERM, HUP)
]  # fmt: skip
AT_ONCE = [Case("eval", "a call that does not return", (INT, INT)), Case("eval", "a call that does not return", (TERM,)),
           Case("eval", "a finalizer", (INT,))]  # fmt: skip
RANKS = [Case("train", "step", (TERM,), 2, (1,)), Case("train", "evaluation", (INT,), 2, (1,)),
         Case("train", "rollouts", (USR1,), 2, (0,)), Case("sample", "sampling", (TERM,), 2, (1,)),
         Case("train", "step", (TERM,), 2, (0, 1)), Case("train", "evaluation", (INT, TERM), 2, (0, 1))]  # fmt: skip
AROUND = [Case("train", "step, its terminal closed", (HUP,)), Case("train", "step, by nohup", (HUP,)),
          Case("torchrun", "step", (TERM,), 2)]  # fmt: skip
CASES = [*TRAINING, *TWICE, *OTHERS, *AT_ONCE, *RANKS, *AROUND]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--n", type=int, default=len(CASES), help=f"cases, drawn by the seed (default: all {len(CASES)})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", help="cases whose names have it; the others keep their rows")
    parser.add_argument("--out", type=Path, default=TARGET, help="the JSON file of the results")


def run(arguments: argparse.Namespace) -> int:
    """A line a case. 1 where one does not end as it should."""
    torch.set_num_threads(1)
    for kind in STOPS:  # a bench in the background, or by nohup, begins with some ignored, and so would its cases
        signal.signal(kind, signal.default_int_handler if kind == INT else signal.SIG_DFL)
    import sklearn.datasets  # noqa: F401  before the forks

    chosen = [c for c in CASES if not arguments.only or arguments.only in c.name]
    if arguments.n < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.n)
    began, rows = os.times(), []
    with tempfile.TemporaryDirectory(prefix="signals-") as place:
        world = World(Path(place), {2} & {c.ranks for c in chosen})
        for i, case in enumerate(chosen):
            rows.append(world.lived(case, i))
            wrong = "; ".join(rows[-1]["wrong"])
            print(
                f"{case.name}: {rows[-1]['codes']} after {rows[-1]['s']:.1f} s{f'  WRONG: {wrong}' if wrong else ''}",
                flush=True,
            )
    spent = sum(b - a for a, b in zip(began[:4], os.times()[:4]))
    if arguments.only and arguments.out.is_file():  # the others keep the rows that the file has
        again = {row["case"] for row in rows}
        rows = [r for r in json.loads(arguments.out.read_text("utf-8"))["rows"] if r["case"] not in again] + rows
    wrong_ = [row for row in rows if row["wrong"]]
    training = [row["s"] for row in rows if row["what"] == "train" and "nohup" not in row["case"]]
    data = {**results_file.about("cpu"), "cases": len(rows), "wrong": len(wrong_), "rows": rows}
    data |= {"slowest_s": max(training, default=0.0), "within_s": WITHIN_S}
    results_file.write_json(arguments.out, data)
    print(f"{len(rows)} cases, {len(wrong_)} wrong; at most {data['slowest_s']:.1f} s to the end; {spent:.0f} CPU s")
    return int(bool(wrong_))


# ------------------------------------------------------------------------------------------------ the world of a case


class World:
    """Undisturbed runs by number of ranks, beside which cases are lived."""

    def __init__(self, folder: Path, more: set[int]) -> None:
        self.folder = folder
        for ranks in (1, *more):
            self.whole(
                ranks
            ).mkdir()  # with features of an untrained classifier: to train one takes longer than the stages
            with torch.random.fork_rng():
                torch.manual_seed(0)
                save_file(Classifier(64, 10).state_dict(), self.whole(ranks) / "extractor.safetensors")
            for stage in ("pre", "mid"):
                line = self._training(self.whole(ranks), stage)
                codes, said = ended(started(line, folder, Case("train", "", (), ranks), False))
                if any(codes):
                    raise RuntimeError(f"the undisturbed {stage} on {ranks} ended with {codes}\n{said}")

    def whole(self, ranks: int) -> Path:
        return self.folder / f"whole-{ranks}"

    @staticmethod
    def _training(out: Path, stage: str) -> list[str]:
        return ["train", "digits", *kills.SMALL, *MORE, "--stages", stage, "--out", str(out)]

    def lived(self, case: Case, number: int) -> dict[str, Any]:
        """A row of the table; `wrong` says what is not as it should be."""
        out, whole = self.folder / f"{number}", self.whole(case.ranks)
        stage = "mid" if "rollouts" in case.at else "pre"
        out.mkdir()
        if case.what in ("train", "torchrun"):
            (out / "run").mkdir()
            shutil.copy(whole / "extractor.safetensors", out / "run")
            shutil.copytree(whole / "reference", out / "run" / "reference")
            if stage == "mid":
                shutil.copytree(whole / "pre", out / "run" / "pre")
        else:
            shutil.copytree(whole, out / "run")
        line = self._line(case, out / "run", stage)
        them = started(line, out, case, True)
        after_s = sent(them, case)
        codes, said = ended(them, after_s)
        wrong = self._judged(case, codes, said)
        took = time.monotonic() - after_s
        if took > WITHIN_S and "nohup" not in case.at:  # which runs to its end
            wrong.append(f"{took:.0f} s late")
        if case.what in ("train", "torchrun"):
            wrong += self._goes_on(case, out, stage, them.seen)
        if wrong:
            wrong.append(said[-600:])
        return {"case": case.name, "what": case.what, "codes": codes, "s": round(took, 2), "wrong": wrong}

    def _line(self, case: Case, run: Path, stage: str) -> list[str]:
        lines = {
            "eval": ["eval", f"{run}/pre", "--n", "30", "--json"],
            "report": ["report", str(run)],
            "sample": ["sample", f"{run}/pre", "--n", "30", "--batch", "1", "--out", f"{run.parent}/samples.npz"],
            "trajectories": ["trajectories", "digits", *kills.SMALL, *MORE, "--stage", "mid", "--from", str(run), "-n", "64",
                             "--cache", f"{run.parent}/store", "--shard-rows", "8"],
            "watch": ["watch", str(run)],
        }  # fmt: skip
        return lines.get(case.what) or self._training(run, stage)

    @staticmethod
    def _judged(case: Case, codes: list[int], said: str) -> list[str]:
        """What is wrong with exit codes and words."""
        wanted = {exits.SIGNAL + case.numbers[0]}
        if "nohup" in case.at:
            wanted = {exits.DONE}
        elif case.what == "torchrun":
            wanted = {1, exits.SIGNAL + TERM, -TERM}  # its own, whatever its ranks give
        elif case.what == "watch" and case.numbers == (INT,):
            wanted = {exits.DONE}  # how a person ends it
        elif case.ranks > 1 or "not return" in case.at:
            wanted = {exits.SIGNAL + n for n in case.numbers}  # of several the first that came
        wrong = [] if set(codes) <= wanted else [f"exit codes {codes}, not {sorted(wanted)}"]
        if case.what != "torchrun" and "Traceback" in said:
            wrong.append("a traceback")
        stops = case.what in ("train", "sample") and "nohup" not in case.at and "terminal" not in case.at
        if stops and "to resume" not in said and "start" not in case.at:
            wrong.append("does not say how to go on")
        return wrong

    def _goes_on(self, case: Case, out: Path, stage: str, seen: list[mmap.mmap]) -> list[str]:
        """What is wrong with what is on disk, and with the end of the same command started again."""
        run, wrong = out / "run", []
        steps = checkpoint.steps(run / stage)
        begun = seen[0][STEP] if case.what == "train" else 1
        if case.at != "start" and begun > 1 and not steps:
            wrong.append("no checkpoint")
        if case.what == "train" and "nohup" not in case.at and steps and steps[-1] < begun - 1:
            wrong.append(f"the checkpoint is of step {steps[-1]}, and step {begun} had begun")
        if not kills.loadable(run, stage):
            wrong.append("a folder that cannot be loaded")
        if case.what == "torchrun":
            return wrong  # it is too long to be ended
        codes, said = ended(started(self._training(run, stage), out, case._replace(what="train", at="again"), False))
        if any(codes):
            wrong.append(f"does not go on: {codes} {said[-400:]}")
        else:
            wrong += kills.differences(run / stage, self.whole(case.ranks) / stage)
        return wrong
