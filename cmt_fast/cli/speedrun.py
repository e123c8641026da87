"""`cmt speedrun`: attempts on a track, records verified, the table. Rules and how to submit one: docs/speedrun.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import progress
from cmt_fast.speedrun import attempt, records, tracks, verifying

RECORDS = Path("records")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    which = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name in tracks.names():
        text = f"an attempt on the track {name}: trains, judges, writes recipe and log"
        of = which.add_parser(name, help=text, description=text)
        of.set_defaults(call=attempted, track=name)
        of.add_argument("--recipe", metavar="FILE", help="YAML file or name (default: the track's own recipe)")
        of.add_argument("--record", metavar="NAME", help="begin with the recipe of a record, as 000-baseline")
        add_overrides(of)
        of.add_argument("--final", metavar="STAGE", help="the stage that is judged (default: the record's, else post)")
        of.add_argument("--seeds", type=int, metavar="N", help="how many, from the track's first on (default: one)")
        of.add_argument("--first-seed", type=int, metavar="N", help="another first seed, to search on: no record")
        of.add_argument("--stop", action="store_true", help="end at the first look below the target: no record")
        of.add_argument("--keep", action="store_true", help="leave the trained runs in FOLDER/runs")
        of.add_argument(
            "--out", type=Path, metavar="FOLDER", help="default: runs/speedrun/TRACK/DIGEST; rerun to go on"
        )
        _records(of)
    text = "look at a record again: rules, sums, first steps; --full trains it anew"
    verify = which.add_parser("verify", help=text, description=text)
    verify.set_defaults(call=verified)
    verify.add_argument("record", metavar="RECORD", help="its folder, or NAME or TRACK/NAME in --records")
    verify.add_argument("--full", type=int, metavar="SEEDS", help="train so many of its seeds and compare the figures")
    _records(verify)
    text = "every record of every track, with p-values"
    table = which.add_parser("table", help=text, description=text)
    table.set_defaults(call=tabled)
    table.add_argument("track", nargs="?", choices=tracks.names(), help="one track alone")
    _records(table)


def _records(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--records", type=Path, default=RECORDS, metavar="FOLDER", help="where records are (default: records)"
    )


def attempted(args: argparse.Namespace) -> None:
    _alone()
    track = tracks.load(args.track)
    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(f"--seeds: {args.seeds} is not at least 1")
    recipe, final = args.recipe, args.final
    given = [o for o in args.overrides if "=" not in o or Path(o).is_file()]
    if len(given) + bool(args.record) + bool(recipe) > 1:
        raise ConfigError(
            f"cmt speedrun {track.name}: name one recipe or one record, not {' and '.join(given) or 'both'}"
        )
    if given:
        recipe = given[0]
    if args.record:
        record = records.find(args.record, args.records, track.name)
        recipe, final = str(record.folder / attempt.RECIPE), final or record.about["final"]
    overrides = [o for o in args.overrides if o not in given]
    final = final or "post"
    run = tracks.entered(track, recipe, overrides, final)
    entry = attempt.Attempt(track, run, final, args.stop)
    first = track.seeds["from"] if args.first_seed is None else args.first_seed
    seeds = list(range(first, first + (args.seeds or 1)))
    which = "" if args.first_seed is None else f"-from-{first}"  # seeds of a search never lie beside those that count
    out = args.out or Path("runs/speedrun") / track.name / f"{entry.digest}{'-stop' * args.stop}{which}"
    stages = tracks.lineage(run, final)
    total = sum(tracks.forwards(run, name) for name in stages)
    progress.say(
        f"{track.name}: {' > '.join(stages)}, {total:,.0f} network forwards a seed; target {records.target(track)}"
    )
    done = attempt.train(entry, seeds, out, args.keep)
    if len(done) > 1:
        progress.say(records.summary(track, done))
    progress.say(f"{out}: recipe and log of {len(done)} seed{'s' * (len(done) > 1)}")


def verified(args: argparse.Namespace) -> None:
    if args.full is not None and args.full < 1:
        raise ConfigError(f"--full: {args.full} is not at least 1")
    _alone()
    record = records.find(args.record, args.records)
    for line in verifying.verify(record, args.full):
        progress.say(line)


def _alone() -> None:
    """Raises ConfigError under a launcher: each of its processes would train all, into one folder."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"WORLD_SIZE: {size}, and an attempt is one process; run cmt speedrun without torchrun")


def tabled(args: argparse.Namespace) -> None:
    for name in [args.track] if args.track else tracks.names():
        print(records.table(tracks.load(name), args.records))
