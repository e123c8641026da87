"""The records: folders of recipe, log and words, when one counts, and the table that is made of their logs alone.

    records/TRACK/NNN-name/     record.yaml   idea, final stage, what the ablation leaves out
                                recipe.yaml   complete, as `cmt speedrun` wrote it
                                log.jsonl     the attempt, seed by seed; ablation/log.jsonl the same without the idea
                                README.md     the idea in words
    records/TRACK/failed-name/  an attempt that did not come below the target, or not faster; kept, since it says as much

A record counts when over at least `seeds.least` seeds, the track's first ones with none left out, the mean distance is below
the target by a one-sided t test at `p`, the mean in the second space is below its guard, and it takes fewer network forwards
than every record before it. Forwards are a function of the recipe and need no test; what differs between seeds is the distance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.evaluation import student
from cmt_fast.speedrun import logs, tracks
from cmt_fast.speedrun.tracks import Track

ABOUT, ABLATION = "record.yaml", "ablation"
NAME = re.compile(r"(\d{3}|failed)-[a-z0-9-]+")
KEYS = {"idea": str, "final": str}


class Record(NamedTuple):
    """A folder of records, read. about: record.yaml; seeds, ablation: of both logs; failed: kept as one that did not count."""

    folder: Path
    track: Track
    about: dict[str, Any]
    seeds: list[logs.Seed]
    ablation: list[logs.Seed]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def failed(self) -> bool:
        return self.name.startswith("failed-")


class Verdict(NamedTuple):
    """What a log adds up to. why: what speaks against its being a record, "" where nothing does but its speed."""

    mean: float
    spread: float
    second: float
    p: float
    forwards: float
    cpu_s: float
    why: str


def read(folder: Path) -> Record:
    """A record. Raises ConfigError where it is none."""
    track, file = tracks.load(folder.absolute().parent.name), folder / ABOUT
    if not NAME.fullmatch(folder.name):
        raise ConfigError(
            f"RECORD: {folder.name!r} is no name of a record; one is 001-short-words, or failed-short-words"
        )
    try:
        about = loading.parse_yaml(file.read_text("utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"RECORD: {str(file)!r} cannot be read ({error.strerror})") from None
    if not isinstance(about, dict):
        raise ConfigError(f"RECORD: {str(file)!r} holds no mapping")
    for key, of in KEYS.items():
        if not isinstance(about.get(key), of):
            raise ConfigError(f"RECORD: {str(file)!r} has no {key}; it needs {', '.join(KEYS)}")
    seeds = _cut(logs.read(folder.parent / str(about.get("of", folder.name)) / logs.NAME), about["final"])
    without = folder / ABLATION / logs.NAME
    if isinstance(known := about.get("ablation"), dict):  # in a log that is there already
        found = _cut(logs.read(folder.parent / str(known.get("of")) / logs.NAME), str(known.get("final")))
        return Record(folder, track, about, seeds, found)
    return Record(folder, track, about, seeds, logs.read(without) if without.is_file() else [])


def _cut(seeds: list[logs.Seed], final: str) -> list[logs.Seed]:
    return [of if of.about["final"] == final else logs.cut(of, final) for of in seeds]


def every(track: Track, root: Path) -> list[Record]:
    """The records of a track in order, those that failed last; none where there is no such folder."""
    folders = sorted(f for f in (root / track.name).glob("*") if f.is_dir())
    return sorted(map(read, folders), key=lambda record: (record.failed, record.name))


def find(name: str, root: Path, track: str | None = None) -> Record:
    """A record by its folder, or by NAME or TRACK/NAME in `root`. Raises ConfigError with those that there are."""
    if (Path(name) / ABOUT).is_file():
        return read(Path(name))
    wanted, known = name.removeprefix(f"{root}/"), {}
    for of in [track] if track else tracks.names():
        known |= {f"{of}/{f.name}": f for f in sorted((root / of).glob("*")) if f.is_dir()}
    chosen = [folder for full, folder in known.items() if wanted in (full, full.partition("/")[2])]
    if len(chosen) == 1:
        return read(chosen[0])
    there = (
        f"there are {', '.join(known)}" if known else f"there are none in {str(root)!r}, --records names their folder"
    )
    raise ConfigError(
        f"RECORD: {name!r} is {'in two tracks' if chosen else 'no record'}; {there}{nearest(name, known)}"
    )


def verdict(track: Track, seeds: Sequence[logs.Seed]) -> Verdict:
    """What the seeds of a log say, by the log alone."""
    first, second = (
        [logs.figure(of, key) for of in seeds if not of.end.get("stopped")] for key in ("frechet", "frechet_2")
    )
    enough = len(first) > 1
    p = student.mean_below(first, track.target["frechet"]) if enough else math.nan
    mean_2 = fmean(second) if second else math.nan
    forwards = {of.end["forwards"] for of in seeds if "failed" not in of.end}
    wanted = list(range(track.seeds["from"], track.seeds["from"] + len(seeds)))
    judges = {(row["extractor"], row["second"], row["n"]) for of in seeds for row in of.judged}
    own = (track.judge["extractor"], track.judge["second"], track.judge["n"])
    against = {
        f"{len(seeds)} of {track.seeds['least']} seeds": len(seeds) < track.seeds["least"],
        "stopped at a look": any(of.end.get("stopped") for of in seeds),
        f"seeds are not {track.seeds['from']}, 1, ...": [of.about["seed"] for of in seeds] != wanted,
        "more than one recipe": len({of.about["digest"] for of in seeds}) > 1 or len(forwards) > 1,
        "another track": any(of.about["track"] != track.name for of in seeds),
        "judged by other features": judges != {own},
        f"mean {fmean(first or [math.inf]):.3f}": not fmean(first or [math.inf]) < track.target["frechet"],
        f"p {p:.2g}": enough and not p < track.p,
        f"second space {mean_2:.4f}": not mean_2 < track.target["frechet_2"],
    }
    spread = stdev(first) if enough and all(map(math.isfinite, first)) else math.nan
    known = [of.end["cpu_s"] for of in seeds]
    return Verdict(
        fmean(first or [math.nan]), spread, mean_2, p, max(forwards, default=math.nan), fmean(known or [math.nan]),
        "; ".join(text for text, holds in against.items() if holds),
    )  # fmt: skip


def standings(track: Track, found: Sequence[Record]) -> dict[str, str]:
    """Name of each record -> "counts", or why it does not: what its log lacks, or a record before it that is no slower."""
    out, best = {}, math.inf
    for record in found:
        of = verdict(track, record.seeds)
        slower = "" if of.forwards < best else f"not fewer forwards than {best:,.0f}"
        out[record.name] = of.why or slower or "counts"
        if out[record.name] == "counts" and not record.failed:
            best = of.forwards
    return out


def against_ablation(record: Record) -> str:
    """The mean of equal seeds without the idea, and by two or more of them the p of the pairs that the idea lies lower; empty
    where no ablation was made."""
    both = {of.about["seed"]: logs.figure(of, "frechet") for of in record.ablation}
    pairs = [(logs.figure(of, "frechet"), both[of.about["seed"]]) for of in record.seeds if of.about["seed"] in both]
    if not pairs:
        return ""
    mine, other = zip(*pairs)
    work = max(of.end["forwards"] for of in record.ablation)
    p = f"p {student.pairs_below(mine, other):.2g}, {len(pairs)} seeds" if len(pairs) > 1 else "1 seed"
    return f"{fmean(other):.3f} at {work:,.0f}, {p}, here {fmean(mine):.3f}"


def target(track: Track) -> str:
    """The target in words."""
    first, second = track.target["frechet"], track.target["frechet_2"]
    return f"Fréchet {first:g} at {track.steps} step (second space {second:g}), {track.judge['n']:,} samples"


def summary(track: Track, seeds: Sequence[logs.Seed]) -> str:
    """An attempt in a line."""
    of = verdict(track, seeds)
    what = f"{track.name}: {len(seeds)} seeds, mean {of.mean:.4f} ± {of.spread:.4f}, p {of.p:.2g}, second space {of.second:.4f}"
    return f"{what}; {of.forwards:,.0f} forwards, {of.cpu_s:.0f} CPU s; {of.why or 'below the target by the rules'}"


def table(track: Track, root: Path, short: bool = False) -> str:
    """All records of a track as Markdown, made of their logs; short: those that count, in fewer columns, as for the README."""
    found = every(track, root)
    if not found:
        return f"{track.title}: no record yet; target {target(track)}.\n"
    standing = standings(track, found)
    if short:
        found = [record for record in found if standing[record.name] == "counts" and not record.failed]
    head = [
        "idea",
        "network forwards",
        "Fréchet, 1 step: mean ± deviation",
        "seeds",
        "p",
        "second space",
        "CPU seconds",
    ]
    head = [track.title, *head, *([] if short else ["without the idea: mean at forwards", "stands"])]
    lines = [
        f"| {' | '.join(head)} |",
        "|" + "".join("---|" if i in (0, 1, 3, 5, 8, 9) else "---:|" for i in range(len(head))),
    ]
    for record in found:
        of, up = verdict(track, record.seeds), "" if short else "../"
        link = f"[{record.name}]({up}records/{track.name}/{record.name}/README.md)"
        first = _number(of.mean, ".3f") + _number(of.spread, ".3f", " ± ")
        work = [f"{of.forwards:,.0f}", first, str(len(record.seeds)), _number(of.p, ".2g")]
        cells = [link, record.about["idea"], *work, f"{of.second:.4f}", f"{of.cpu_s:.0f}"]
        if not short:
            counts = standing[record.name] == "counts"
            cells += [against_ablation(record), "**counts**" if counts else standing[record.name]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_footer(track, found, short)]) + "\n"


def _footer(track: Track, found: Sequence[Record], short: bool) -> list[str]:
    """What the columns mean, and where the seconds were measured."""
    on = sorted({_machine(of.about["machine"]) for record in found for of in record.seeds})
    energy = any(of.end["joules"] is not None for record in found for of in record.seeds)
    joules = "" if energy else "; no machine of these could read its energy"
    limit = track.target["frechet"]
    pairs = "" if short else "; beside the mean without the idea: that the idea lies lower, by pairs of seeds"
    return [
        f"Target: {target(track)}; a backward counts two forwards. p: one-sided t test of the mean against {limit:g}, below "
        f"{track.p:g} to count{pairs}. "
        f"Seconds are of one seed, without judging, on {' and '.join(on)}{joules}."
    ]


def _number(value: float, how: str, before: str = "") -> str:
    """A number in a cell; nothing where one seed has none."""
    return "" if math.isnan(value) else f"{before}{value:{how}}"


def _machine(on: dict[str, Any]) -> str:
    return f"{logs.device(on)}, torch {on['torch']}"
