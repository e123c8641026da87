"""A record looked at again: in seconds by what its log and recipe say and by its first steps, or in full by training it anew."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.speedrun import attempt, logs, records, tracks
from cmt_fast.speedrun.attempt import Attempt
from cmt_fast.speedrun.records import Record

ELSEWHERE = 1e-4  # relative: of losses of the first steps on another kind of machine
FIGURES = ("frechet", "frechet_2")


def verify(record: Record, full: int | None = None, steps: int | None = None) -> Iterator[str]:
    """What was found, line by line. full: seeds to train anew; steps: of the first ones (default: all in the log). Raises
    ConfigError at the first thing that is not as it says."""
    if not record.seeds:
        raise ConfigError(f"RECORD: {record.folder / logs.NAME} holds no seed that came to its end")
    entry = entered(record)
    yield f"{record.name}: keeps to the track {record.track.name}; recipe and log are of one digest, {entry.digest}"
    yield sums(record, entry.run)
    yield first_steps(record, entry.run, steps)
    if full:
        yield from again(record, entry, full)
    of = records.verdict(record.track, record.seeds)
    yield f"{records.summary(record.track, record.seeds)}" if not of.why else f"no record: {of.why}"


def entered(record: Record) -> Attempt:
    """What the record's recipe trains. Raises ConfigError where it breaks a rule, or the log is of another recipe."""
    final = record.about["final"]
    run = tracks.entered(record.track, str(record.folder / attempt.RECIPE), (), final)
    entry = Attempt(record.track, run, final)
    for of in record.seeds:
        if of.about["digest"] != entry.digest:
            raise ConfigError(
                f"RECORD: seed {of.about['seed']} is of {of.about['digest']}, the recipe is {entry.digest}"
            )
    return entry


def sums(record: Record, run: Run) -> str:
    """Whether every seed's ends are what its lines add up to and its recipe costs. Raises ConfigError."""
    for of in record.seeds:
        if "failed" in of.end:
            continue
        stages = tracks.lineage(run, record.about["final"])
        plans = [(name, tracks.forwards(run, name), _images(run, name)) for name in stages]
        found = [(row["stage"], row["forwards"], row["images"]) for row in of.stages]
        judged = next((row for row in of.judged if row["stage"] == record.about["final"]), {})
        totals = {"forwards": sum(f for _, f, _ in plans), "images": sum(n for *_, n in plans)}
        totals = {**logs.total(of.stages), **totals}
        totals |= {key: judged.get(key) for key in FIGURES}
        if found != plans or any(of.end[key] != value for key, value in totals.items()):
            raise ConfigError(
                f"RECORD: the end of seed {of.about['seed']} is not what its lines and its recipe add up to"
            )
    forwards = record.seeds[0].end["forwards"]
    return f"{record.name}: {forwards:,.0f} forwards, as counted from the recipe; {len(record.seeds)} ends are their lines' sums"


def _images(run: Run, name: str) -> int:
    return tracks.planned(run, name).nimg(tracks.planned(run, name).total)


def first_steps(record: Record, run: Run, steps: int | None = None) -> str:
    """Take the first steps of the first seed again, all that its log has or `steps`: equal losses on the same kind of machine,
    within ELSEWHERE on another. Raises ConfigError where they are not."""
    of = record.seeds[0]
    known = {**of.about["first"], "losses": of.about["first"]["losses"][:steps]}
    with tempfile.TemporaryDirectory() as place:
        work = attempt.opened(record.track, dataclasses.replace(cast(Any, run), seed=of.about["seed"]), Path(place))
        found = attempt.first_losses(work, known["stage"], len(known["losses"]))["losses"]
        same = same_machine(attempt.this_machine(work.device), of.about["machine"])
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, known["losses"]))
    limit = 0.0 if same else ELSEWHERE
    what = f"losses of the first {len(found)} steps of {known['stage']}, seed {of.about['seed']}"
    where = "the same kind of machine" if same else "another kind of machine"
    if not worst <= limit:
        raise ConfigError(f"RECORD: {what} differ by {worst:.1e} of their size on {where}, at most {limit:g} is right")
    return f"{record.name}: {what}, are {'equal to the last bit' if not worst else f'within {worst:.1e}'} ({where})"


def same_machine(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two machines give the same bits: processor or GPU, versions, ops, threads."""
    return all(mine.get(key) == theirs.get(key) for key in ("cpu", "gpu", "torch", "threads", "rounds", "attention"))


def again(record: Record, entry: Attempt, seeds: int) -> Iterator[str]:
    """Train the first seeds anew and put their figures beside the log's."""
    with tempfile.TemporaryDirectory() as place:
        wanted = [of.about["seed"] for of in record.seeds[:seeds]]
        for of in attempt.train(entry, wanted, Path(place) / "again", tell=lambda line: None):
            log = next(s for s in record.seeds if s.about["seed"] == of.about["seed"])
            mine, theirs = (", ".join(f"{s.end.get(key)}" for key in FIGURES) for s in (of, log))
            same = same_machine(of.about["machine"], log.about["machine"])
            if same and mine != theirs:
                raise ConfigError(
                    f"RECORD: seed {of.about['seed']} came to {mine}, its log says {theirs}, on one kind of machine"
                )
            yield f"{record.name}: seed {of.about['seed']} came to {mine}; its log says {theirs}{'' if same else ' elsewhere'}"
