"""The log of an attempt: JSON lines, seed by seed, and what they add up to.

    {"kind": "seed"}    what is trained, where and by what: digests, commit, machine, losses of the first steps
    {"kind": "stage"}   steps, student images, network forwards, seconds and joules of a stage, its loss as it fell
    {"kind": "look"}    of --stop: the distance on the way
    {"kind": "judged"}  a few-step stage's figures at the track's number of steps
    {"kind": "end"}     the final stage's figures, and the sums of all stages; or "failed" and why

Only what stands in a log enters a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.storage import files

NAME = "log.jsonl"
CLOCK = ("startup", "train", "teacher", "checkpoint", "stalled")  # what is on it; evaluations are not


class Seed(NamedTuple):
    """One seed of an attempt: the lines of its log by kind."""

    about: dict[str, Any]
    stages: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    end: dict[str, Any]


def read(file: Path) -> list[Seed]:
    """The seeds of a log that came to an end, in order. Raises ConfigError where it is no log."""
    seeds: dict[int, dict[str, list]] = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"RECORD: {str(file)!r} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            of = seeds.setdefault(int(row["seed"]), {})
            of.setdefault(str(row["kind"]), []).append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"RECORD: line {number} of {str(file)!r} is no line of an attempt") from None
    for seed, of in seeds.items():
        if any(len(of.get(kind, [])) > 1 for kind in ("seed", "end")):
            raise ConfigError(f"RECORD: {str(file)!r} holds seed {seed} twice")
    whole = [seeds[seed] for seed in sorted(seeds) if {"seed", "end"} <= seeds[seed].keys()]
    return [Seed(of["seed"][0], of.get("stage", []), of.get("judged", []), of["end"][0]) for of in whole]


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add the lines of a seed, whole or not at all."""
    before = file.read_text("utf-8") if file.is_file() else ""
    files.write_text(file, before + "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def figure(seed: Seed, key: str) -> float:
    """A number of the end; infinite where it failed, so that no mean is below a target with it."""
    return float(seed.end[key]) if "failed" not in seed.end else math.inf


def total(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What stages took together; joules are null where those of one are."""
    joules = [row["joules"] for row in stages]
    return {
        "images": sum(row["images"] for row in stages),
        "forwards": sum(row["forwards"] for row in stages),
        "wall_s": round(sum(row["wall_s"] for row in stages), 2),
        "cpu_s": round(sum(row["cpu_s"] for row in stages), 2),
        "joules": None if None in joules else round(sum(joules), 1),
    }


def cut(seed: Seed, final: str) -> Seed:
    """The same seed as though an earlier few-step stage had been its last: a stage knows nothing of those after it, so the
    attempt would have had these very lines. Raises ConfigError where that stage was not judged."""
    names = [row["stage"] for row in seed.stages]
    judged = next((row for row in seed.judged if row["stage"] == final), None)
    if judged is None or final not in names or "failed" in seed.end:
        raise ConfigError(f"RECORD: seed {seed.about['seed']} of the log has no figures of {final}")
    stages = seed.stages[: names.index(final) + 1]
    about = {**seed.about, "final": final, "digest": f"{seed.about['digest'].partition('-')[0]}-{final}"}
    end = {**seed.end, **{key: judged[key] for key in ("frechet", "frechet_2")}, **total(stages)}
    return Seed(about, stages, [judged], end)


def device(on: Mapping[str, Any]) -> str:
    """A log's machine in words: its GPU, or its processor and threads."""
    return on["gpu"] if on["gpu"] != "none" else f"{on['cpu']}, {on['threads']} thread{'s' * (on['threads'] > 1)}"
