"""SIGKILLs of training processes at random moments: what is left is read, the same run goes on, and its end is compared.

One rank, and two ranks under ZeRO 1 and ZeRO 2, train the stages of a tiny digits run in processes that are forked from this one.
A life of a stage is killed again and again until it ends by itself; then its weights, EMA tracks, optimizer moments and metrics
are held against those of a run that nobody disturbed. A kill is aimed by dice: at a start, at a step, into a save, an evaluation,
or a round of rollouts; what it met is read from memory that the process shares and writes as it goes. Of two ranks one is
killed, or both; a survivor has to end by itself, with the exit code that says that another rank is lost, as torchrun would then
start them again.

After every kill each checkpoint under its final name must verify, the newest must load, and all rows of metrics must be read.
100 kills take about 7 CPU minutes, 100 s of them for one rank.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch._dynamo

from bench.harness import results_file
from cmt_fast.config import loading
from cmt_fast.config.schema import STAGES
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, exits, watchdog
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.teacher import rollouts
from cmt_fast.train import loop
from cmt_fast.train.batches import BatchProvider

TARGET = results_file.ROOT / "bench" / "results" / "cpu" / "kills.json"
STEPS, EVERY, LOOKS, BATCH = 48, 4, 12, 32  # of a stage; a checkpoint, and an evaluation, every so many
PATIENCE_S = 60.0  # for a survivor to end by itself
SMALL = [
    "device=cpu", "model.width=16", "model.depth=1", "model.heads=2", "eval.n=100", "eval.n_during=50",
    "pre.ema=[{kind: constant, beta: 0.99}, {kind: power, sigma_rel: 0.1}]",
    "mid.trajectories.pool_steps=4", "post.trajectories.pool_steps=4", "mid.trajectories.rollout_batch=8",
    *(f"{s}.{key}={value}" for s in STAGES for key, value in (
        ("images_nimg", BATCH * STEPS), ("batch", BATCH), ("warmup_nimg", 0), ("checkpoint_every_nimg", BATCH * EVERY),
        ("eval_every_nimg", BATCH * LOOKS), ("grid_every_nimg", "null"))),
]  # fmt: skip
# what the shared memory counts or flags, and the word of a kill that met it
STEP, SAVE, LOOK, ROLL = range(4)
MET = {SAVE: "in a save", LOOK: "in an evaluation", ROLL: "in a round of rollouts"}
AIMS = ("start", "step", "save", "save", "look", "roll")


class Setting(NamedTuple):
    """name: of the table; zero: its stage, None for the local engine; share: of the kills."""

    name: str
    ranks: int
    zero: int | None
    share: float

    @property
    def overrides(self) -> list[str]:
        return SMALL + ([] if self.zero is None else ["engine=zero", f"zero_stage={self.zero}"])


SETTINGS = (Setting("one rank", 1, None, 0.5), Setting("ZeRO 1", 2, 1, 0.25), Setting("ZeRO 2", 2, 2, 0.25))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=100, help="kills in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", action="append", choices=[s.name for s in SETTINGS], help="default: all of them")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=TARGET, help="the JSON file of the results")


def run(arguments: argparse.Namespace) -> int:
    """Kill, and print the table. 1 where a folder could not be read, or a run did not end as the undisturbed one."""
    wanted = [s for s in SETTINGS if s.name in (arguments.setting or [s.name for s in SETTINGS])]
    stages = [s for s in STAGES if s in arguments.stages.split(",")]
    torch.set_num_threads(1)
    import sklearn.datasets  # noqa: F401  before the forks

    if any(s.zero is not None for s in wanted):
        _deepspeed()
    began, whole = os.times(), sum(s.share for s in wanted)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        for setting in wanted:
            dice = random.Random(f"{arguments.seed} {setting.name}")
            folder = Path(place) / setting.name.replace(" ", "-")
            rows.append(killed(setting, stages, round(arguments.n * setting.share / whole), dice, folder))
            print(_row(rows[-1]), flush=True)
    spent = sum(b - a for a, b in zip(began[:4], os.times()[:4]))
    held = not any(row["unloadable"] or any(row["different"].values()) or row["odd"] for row in rows)
    data = {**results_file.about("cpu"), "seed": arguments.seed, "steps": STEPS, "rows": rows, "cpu_s": round(spent)}
    data |= {"kills": sum(row["kills"] for row in rows), "lives": sum(row["lives"] for row in rows)}
    data |= {"unloadable": sum(row["unloadable"] for row in rows), "held": held}
    data["differences"] = sum(sum(row["different"].values()) for row in rows)
    results_file.write_json(arguments.out, data)
    print(f"{data['kills']} kills, {data['lives']} lives that ended, {data['unloadable']} folders that could not be loaded, "
          f"{data['differences']} differences; {spent:.0f} CPU s")  # fmt: skip
    return 0 if held else 1


def _row(row: dict[str, Any]) -> str:
    met = ", ".join(f"{n} {what}" for what, n in sorted(row["met"].items()))
    ended = ", ".join(f"{n} x {code}" for code, n in sorted(row["survivors"].items()))
    different = ", ".join(f"{what} {n}" for what, n in row["different"].items())
    text = f"{row['setting']:9} {row['kills']:3} kills ({met}); {row['lives']} lives; unloadable {row['unloadable']}"
    text += f"; differences: {different}"
    return text + (f"; survivors ended with {ended}" if ended else "")


# ------------------------------------------------------------------------------------------------ lives and kills


def killed(setting: Setting, stages: list[str], n: int, dice: random.Random, folder: Path) -> dict[str, Any]:
    """A row of the table: n kills over the stages, each in lives that are compared at their end."""
    whole = folder / "whole"
    for stage in STAGES[: max(map(STAGES.index, stages)) + 1]:
        codes = Group(setting, whole, stage).wait()
        if any(codes):
            raise RuntimeError(f"{setting.name}: the undisturbed {stage} ended with {codes}\n{_log(whole)}")
    row: dict[str, Any] = {"setting": setting.name, "kills": 0, "lives": 0, "unloadable": 0, "odd": []}
    row |= {"different": dict.fromkeys(("weights", "EMA", "optimizer", "metrics"), 0)}
    met, survivors, by_stage = Counter[str](), Counter[str](), Counter[str]()
    for i, stage in enumerate(stages):
        mine = n // len(stages) + (i < n % len(stages))
        while by_stage[stage] < mine:
            out = folder / f"{stage}-{row['lives']}"
            for parent in STAGES[: STAGES.index(stage)]:
                shutil.copytree(whole / parent, out / parent)
            if by_stage[
                stage
            ]:  # the first life of a stage begins with nothing: it is killed as it trains the extractor too
                out.mkdir(exist_ok=True)
                shutil.copy(whole / "extractor.safetensors", out)
                shutil.copytree(whole / "reference", out / "reference")
            for _ in range(mine - by_stage[stage]):
                group = Group(setting, out, stage)
                what = group.killed(dice)
                codes = group.wait()
                if what is None:
                    break  # it ended first
                by_stage[stage] += 1
                met[what] += 1
                survivors.update(str(code) for code in codes if code not in (-signal.SIGKILL, 0))
                odd = [c for c in codes if c not in (-signal.SIGKILL, 0, exits.PEER_LOST)]
                row["odd"] += [f"{stage}, killed {what}: {c}: {_log(out)[-2000:]}" for c in odd]
                row["unloadable"] += not loadable(out, stage)
            else:
                codes = Group(setting, out, stage).wait()
            if any(codes):
                row["odd"].append(f"{stage} ended with {codes}: {_log(out)[-2000:]}")
            row["lives"] += 1
            for what in differences(out / stage, whole / stage):
                row["different"][what] += 1
            shutil.rmtree(out)
    return row | {"kills": by_stage.total(), "met": met, "survivors": survivors, "by_stage": by_stage}


class Group:
    """The ranks of a setting that train one stage of a run, forked from this process."""

    def __init__(self, setting: Setting, out: Path, stage: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.seen = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(setting.ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": setting.ranks, "LOCAL_WORLD_SIZE": setting.ranks, "MASTER_ADDR": "127.0.0.1"}
        self.pids = []
        for rank in range(setting.ranks):
            pid = os.fork()
            if not pid:
                where = {**world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
                _child(setting, out, stage, self.seen[rank], where)
            self.pids.append(pid)
        self.codes: dict[int, int] = {}

    def killed(self, dice: random.Random) -> str | None:
        """Kill it where the dice say; what that met, or None where it had ended before."""
        aim = dice.choice(AIMS)
        victim = 0 if aim == "save" else dice.randrange(len(self.pids))
        seen, now = self.seen[victim], time.monotonic()
        flag = {"start": None, "step": STEP, "save": SAVE, "look": LOOK, "roll": ROLL}[aim]
        wait_s = {"start": 0.5, "step": 0.3, "save": 0.02, "look": 0.05, "roll": 0.02}[aim]
        skipped = dice.randrange(3) if aim == "save" else 0  # not always the first
        while flag is not None and not (seen[flag] and seen[STEP] >= skipped * EVERY):
            if not self._alive() or (aim in ("look", "roll") and time.monotonic() - now > 4.0):
                break  # no rollouts in this stage: at any step
            time.sleep(0.0002)
        time.sleep(dice.uniform(0, wait_s))
        if not self._alive():
            return None
        both = len(self.pids) > 1 and dice.random() < 0.2
        state = [seen[i] for i in range(4)]  # as near to the kill as can be
        for pid in self.pids if both else [self.pids[victim]]:
            os.kill(pid, signal.SIGKILL)
        met = next((word for i, word in MET.items() if state[i]), "between" if state[STEP] else "as it started")
        return "between steps" if met == "between" else met

    def _alive(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return not self.codes

    def wait(self) -> list[int]:
        """Their exit codes, by rank. One that does not end by itself once another has is killed, and has the code 124."""
        until = None
        while len(self.codes) < len(self.pids):
            self._alive()
            if self.codes and until is None:
                until = time.monotonic() + PATIENCE_S
            if until is not None and time.monotonic() > until:
                for rank, pid in enumerate(self.pids):
                    if rank not in self.codes:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        self.codes[rank] = 124
            time.sleep(0.002)
        return [self.codes[rank] for rank in range(len(self.pids))]


def _child(setting: Setting, out: Path, stage: str, seen: mmap.mmap, where: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        said = os.open(out / f"said-{where['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update({key: str(value) for key, value in where.items()})
        _told(seen)
        run_ = loading.load("digits", setting.overrides)
        watchdog.LOST_S = PATIENCE_S / 6  # of a rank that waits for one that died as they met
        distributed.start(torch.device("cpu"), PATIENCE_S / 3)  # by which it waits twice before they have met
        loop.train(Workspace(run_, out), [stage])
        distributed.stop()
        code = exits.DONE
    except Exception as error:
        lost = distributed.lost(error) if isinstance(error, RuntimeError) else None
        code = exits.FAILED if lost is None else exits.PEER_LOST
        if lost is None:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _told(seen: mmap.mmap) -> None:
    """From now on this process says in `seen` what it is at: steps begun, and whether it saves, evaluates, rolls out."""

    def flagged(owner: Any, name: str, flag: int) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            seen[flag] += 1
            try:
                return real(*given, **more)
            finally:
                seen[flag] -= 1

        setattr(owner, name, call)

    flagged(checkpoint, "save", SAVE)
    flagged(loop.monitor, "observe", LOOK)
    flagged(rollouts.Rolling, "__call__", ROLL)
    draw = BatchProvider.draw

    def drawn(*given: Any, **more: Any) -> Any:
        seen[STEP] = min(seen[STEP] + 1, 255)
        return draw(*given, **more)

    BatchProvider.draw = drawn  # type: ignore[method-assign]


def _log(out: Path) -> str:
    return "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted(out.glob("said-*.log")))


def _deepspeed() -> None:
    """Imported once, before the forks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


# ------------------------------------------------------------------------------------------------ what is left, and the end


def loadable(out: Path, stage: str) -> bool:
    """Whether every checkpoint under its final name is whole, the newest is found, and run.json and the metrics are read."""
    try:
        for step in checkpoint.steps(out / stage):
            found = checkpoint.verify(checkpoint.folder_of(out / stage, step))
            for name in found.manifest["files"]:
                found.tensors(name.removesuffix(".safetensors"))
        checkpoint.latest(out / stage)
        metrics = out / stage / metrics_log.METRICS
        if metrics.is_file():
            list(metrics_log.rows(metrics))
        if (out / "run.json").is_file():
            json.loads((out / "run.json").read_text("utf-8"))
    except Exception as error:
        print(f"{out.name}: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def differences(stage: Path, undisturbed: Path) -> list[str]:
    """What of a finished stage is not, bit for bit, as in the other: weights, EMA, optimizer, metrics."""
    try:
        one, two = checkpoint.complete(stage), checkpoint.complete(undisturbed)
    except checkpoint.CheckpointError as error:
        print(error, flush=True)
        return ["weights", "EMA", "optimizer", "metrics"]
    kinds = {"weights": "model", "EMA": "ema", "optimizer": "optimizer"}
    found = []
    for what, start in kinds.items():
        names = {name for found_ in (one, two) for name in found_.manifest["files"] if name.startswith(start)}
        if not names or not all(_same(one, two, name) for name in names):
            found.append(what)
    rows = [
        [{k: v for k, v in row.items() if k != "wall"} for row in metrics_log.rows(f / metrics_log.METRICS)]
        for f in (stage, undisturbed)
    ]
    return found + (["metrics"] if rows[0] != rows[1] or not rows[0] else [])


def _same(one: checkpoint.Checkpoint, two: checkpoint.Checkpoint, name: str) -> bool:
    """By the tensors' bytes, which are read, and not by what manifests say of them."""
    if not all((c.folder / name).is_file() for c in (one, two)):
        return False
    x, y = (c.tensors(name.removesuffix(".safetensors")) for c in (one, two))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
