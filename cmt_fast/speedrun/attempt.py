"""An attempt: a recipe trained from random weights over seeds, each judged at its end, and all of it written to a log.

The length of an attempt is the recipe's, not the moment at which a look falls below the target: the lowest of many looks is
lower than the network is, and a mean of such figures proves nothing. `stop` does end at that moment, to see how fast an idea
could be; it says so in its log, and no such log is a record.

On the clock is all that `cmt train` does: reading data, trajectories, steps, checkpoints. Judging is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml

from cmt_fast import api
from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION, Run
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import machine, progress
from cmt_fast.runtime.signals import Stopped
from cmt_fast.speedrun import logs, tracks
from cmt_fast.speedrun.tracks import Track
from cmt_fast.storage import files, locks, metrics_log
from cmt_fast.train import loop
from cmt_fast.train.half_way import HalfWay
from cmt_fast.usage import rapl
from cmt_fast.usage.meters import Meter, Own

RECIPE, RUNS, EXTRACTOR = "recipe.yaml", "runs", "extractor.safetensors"
FIRST = 8  # steps of the first stage whose losses are kept one by one


class Attempt(NamedTuple):
    """What is trained. stop: at the first look below the target."""

    track: Track
    run: Run
    final: str
    stop: bool = False

    @property
    def digest(self) -> str:
        """Of the recipe, the same for all seeds, with the stage that is judged."""
        return f"{fingerprint.digest(self.run)[:16]}-{self.final}"


def train(
    attempt: Attempt, seeds: list[int], out: Path, keep: bool = False, tell: Callable[[str], None] = progress.say
) -> list:
    """Train and judge each seed that the log in `out` does not have yet. Returns all seeds of that log.

    keep: leave the runs in `out`/runs. Raises ConfigError where `out` holds an attempt of another recipe, or runs that are of
    none, or where another process is at it.
    """
    file, runs = out / logs.NAME, out / RUNS
    with _held(out):
        done = [of.about["seed"] for of in _begun(attempt, out)]
        for seed in seeds:
            if seed not in done:
                folder = runs / f"seed-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                logs.write(file, one(attempt, seed, folder))
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)
            tell(said(next(of for of in logs.read(file) if of.about["seed"] == seed)))
        with contextlib.suppress(OSError):  # of another seed that is kept, or of what somebody put there
            runs.rmdir()
        return logs.read(file)


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Inside, no other process trains seeds into this folder, which is made. Raises ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = locks.take(out, progress.say)
    except locks.Taken as taken:
        raise ConfigError(
            f"--out: {out} is in use by {taken.by}; seeds of one attempt are trained one by one"
        ) from None
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written to ({error.strerror})") from None
    try:
        yield
    finally:
        held.close(remove=True)


def _begun(attempt: Attempt, out: Path) -> list[logs.Seed]:
    """The seeds that are done in a folder, in which the recipe is written where none is. Raises ConfigError where what is there
    is not this attempt's: its runs are taken away when they are judged."""
    file, recipe = out / logs.NAME, out / RECIPE
    there = [name for name in (logs.NAME, RUNS) if (out / name).exists()]
    if not recipe.is_file():
        if there:
            raise ConfigError(f"--out: {out} holds {there[0]}, and no {RECIPE} that says whose; choose another folder")
        files.write_text(recipe, yaml.safe_dump(loading.dump(attempt.run), sort_keys=False, width=120))
    elif fingerprint.digest(loading.load(str(recipe))) != fingerprint.digest(attempt.run):
        raise ConfigError(f"--out: {out} holds an attempt of another recipe; choose another folder")
    done = logs.read(file) if file.is_file() else []
    for of in done:
        if of.about["digest"] != attempt.digest or of.about["stop"] != attempt.stop:
            what = (
                "of another recipe"
                if of.about["digest"] != attempt.digest
                else f"{'with' if of.about['stop'] else 'without'} --stop"
            )
            raise ConfigError(f"--out: {out} holds an attempt {what}; choose another folder")
    return done


def one(attempt: Attempt, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train and judge one seed; the lines of its log."""
    track, final = attempt.track, attempt.final
    run = dataclasses.replace(cast(Any, attempt.run), seed=seed)
    if attempt.stop:
        run = _looking(run, final, track)
    work = opened(track, run, folder)
    names = tracks.lineage(run, final)
    rows = [_about(attempt, seed, work) | {"first": first_losses(work, names[0], FIRST)}]
    meter = _meter(work.device)
    looks, failed, stopped = _Looks(track, final, work), "", False
    for name in names:
        before = _spent(meter)
        try:
            loop.train(work, [name], meter=meter, page=looks if attempt.stop else None)
        except _Reached:
            stopped = True
        except FloatingPointError as error:
            failed = str(error)
        rows += [{"kind": "stage", "seed": seed, "stage": name, **_trained(work, name), **_more(_spent(meter), before)}]
        if failed:
            break
    rows += [{**row, "seed": seed} for row in looks.rows]
    figures = {} if failed or stopped else {name: _judge(work, track, name) for name in names if _few(run, name)}
    rows += [{"kind": "judged", "seed": seed, "stage": name, **found} for name, found in figures.items()]
    end = {"failed": failed} if failed else looks.rows[-1]["figures"] if stopped else figures[final]
    stages = [row for row in rows if row["kind"] == "stage"]
    energy = (meter.counter.reason or "not measured") if stages[-1]["joules"] is None else ""
    ended = {**_end(track, end), **logs.total(stages), "energy": energy, "stopped": stopped}
    return [*rows, {"kind": "end", "seed": seed, **ended}]


def _meter(device: torch.device) -> Meter:
    """Of this process; on a processor with RAPL's joules."""
    return Meter.of(device) if device.type == "cuda" else Meter("core", torch.get_num_threads(), rapl.Packages())


def opened(track: Track, run: Run, folder: Path) -> Workspace:
    """The run in its folder, with the track's frozen features where the package holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    frozen = tracks.FOLDER / f"{track.name}.safetensors"
    if frozen.is_file():
        shutil.copyfile(frozen, folder / EXTRACTOR)
    return Workspace(run, folder)


def first_losses(work: Workspace, stage: str, steps: int) -> dict[str, Any]:
    """The losses of the first steps of the first stage, in full: by them a record is known again in seconds."""
    _, step = api.training_steps(work, stage)
    return {"stage": stage, "losses": [step()["loss"] for _ in range(min(steps, work.stage(stage).schedule.total))]}


def this_machine(device: torch.device) -> dict[str, Any]:
    """What bits and seconds depend on."""
    return {
        **machine.environment(),
        "rounds": machine.rounds(device),
        "attention": os.environ.get("CMT_PROCESSOR", "timed"),
    }


def _about(attempt: Attempt, seed: int, work: Workspace) -> dict[str, Any]:
    return {
        "kind": "seed", "seed": seed, "track": attempt.track.name, "final": attempt.final, "stop": attempt.stop,
        "digest": attempt.digest, "commit": machine.commit(), "date": date.today().isoformat(),
        "machine": this_machine(work.device),
    }  # fmt: skip


def _few(run: Run, name: str) -> bool:
    """Whether a stage trains what few steps can be judged of."""
    return run.stages[name].objective.kind not in DIFFUSION


def _trained(work: Workspace, name: str) -> dict[str, Any]:
    """What a stage, or those of its steps that were taken, saw and did, and its loss as its metrics have it."""
    file = work.stage_dir(name) / metrics_log.METRICS
    found = [row for row in metrics_log.read(file) if row["kind"] == "train"] if file.is_file() else []
    steps = found[-1]["step"] if found else 0
    return {
        "steps": steps,
        "images": work.stage(name).schedule.nimg(steps),
        "forwards": tracks.forwards(work.run, name, steps),
        "loss": [[row["nimg"], float(f"{row['loss']:.5g}")] for row in found],
    }


def _spent(meter: Meter) -> Own:
    """All that is on the clock so far; joules are None where something of them is not known."""
    parts = [meter.own[phase] for phase in logs.CLOCK if phase in meter.own]
    known = [part.joules for part in parts if part.joules is not None]
    return Own(
        sum(p.wall_s for p in parts), sum(p.cpu_s for p in parts), sum(known) if len(known) == len(parts) else None
    )


def _more(now: Own, before: Own) -> dict[str, Any]:
    """What came onto it."""
    joules = None if now.joules is None or before.joules is None else round(now.joules - before.joules, 1)
    return {
        "wall_s": round(now.wall_s - before.wall_s, 2),
        "cpu_s": round(now.cpu_s - before.cpu_s, 2),
        "joules": joules,
    }


def _judge(work: Workspace, track: Track, name: str) -> dict[str, Any]:
    """Figures of a stage's network at the track's number of steps, in both spaces."""
    n = track.judge["n"]
    judge = work.judging.open_judge(samples=n)
    found = work.judging.evaluate(work.network(name), (track.steps,), n, judge=judge, quiet=True)[str(track.steps)]
    kept = {key: value for key, value in found.items() if isinstance(value, float)}
    assert judge.kept is not None
    return {**kept, "n": n, "extractor": judge.name, "second": judge.kept.about["second"]}


def _end(track: Track, figures: dict[str, Any]) -> dict[str, Any]:
    if "failed" in figures:
        return {"failed": figures["failed"], "reached": False}
    kept = {key: figures[key] for key in ("frechet", "frechet_2") if key in figures}
    return {**kept, "reached": tracks.reached(track, figures) if len(kept) == 2 else figures["reached"]}


def said(of: logs.Seed) -> str:
    """One seed in a line."""
    e = of.end
    if "failed" in e:
        what = f"failed ({e['failed']})"
    else:
        second = f", second space {e['frechet_2']:.4f}" if "frechet_2" in e else ""
        what = f"Fréchet {e['frechet']:.4f}{second}, {'below' if e['reached'] else 'not below'} the target"
    energy = f"{e['joules']:,.0f} J" if e["joules"] is not None else f"no joules ({e['energy']})"
    device = logs.device(of.about["machine"])
    return (
        f"seed {of.about['seed']}: {what}{' at a look: no record' if e['stopped'] else ''}; {e['images']:,} student images, "
        f"{e['forwards']:,.0f} forwards, {e['wall_s']:.0f} s ({e['cpu_s']:.0f} CPU s), {energy}; {device}"
    )


class _Reached(Stopped):
    """A look below the target."""


class _Looks(HalfWay):
    """In the place of a run's page: after every evaluation of the final stage it asks whether the target is reached."""

    def __init__(self, track: Track, final: str, work: Workspace) -> None:
        super().__init__(None)
        self.track, self.file, self.rows = track, work.stage_dir(final) / metrics_log.METRICS, list[dict[str, Any]]()

    def draw(self) -> bool:
        """Raises _Reached where it is, by the first space alone: on the way the second is not asked."""
        seen = [r for r in metrics_log.read(self.file) if r["kind"] == "eval"] if self.file.is_file() else []
        if len(seen) == len(self.rows):
            return False
        figures = {"frechet": seen[-1]["steps"][str(self.track.steps)]["frechet"]}
        figures["reached"] = figures["frechet"] < self.track.target["frechet"]
        self.rows.append({"kind": "look", "nimg": seen[-1]["nimg"], "figures": figures})
        if figures["reached"]:
            raise _Reached(0)
        return False


def _looking(run: Run, final: str, track: Track) -> Run:
    """The same, its final stage judged on the way."""
    stage = dataclasses.replace(cast(Any, run.stages[final]), eval_every_nimg=track.look_every_nimg)
    return dataclasses.replace(cast(Any, run), **{final: stage})
