"""`cmt runs`: what runs there are, what one is, how two differ, and what of one can go."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from cmt_fast.config.errors import ConfigError
from cmt_fast.render import grids, templates
from cmt_fast.report import runs as runs_
from cmt_fast.report import runs_tables as tables
from cmt_fast.run import folder as folder_
from cmt_fast.run import needs, removing
from cmt_fast.runtime import words
from cmt_fast.runtime.progress import say
from cmt_fast.storage import checkpoint, pruning


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, call, text: str) -> argparse.ArgumentParser:
        inner = actions.add_parser(name, help=text, description=text)
        inner.set_defaults(call=call)
        return inner

    p = action("ls", ls, "the runs in a folder: stages, figures, hours, size, whether they are alive")
    p.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    p.add_argument("--sort", choices=tuple(tables.SORTS), default="name", help="the newest or largest first")
    p.add_argument("--json", action="store_true", help="print the same as JSON")

    p = action("show", show, "one run: stages, where they come from, its settings, its data, its files")
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/digits")
    p.add_argument("--json", action="store_true", help="print the same as JSON")

    p = action("compare", compare, "two runs: settings that differ, figures side by side, pictures")
    p.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="the folders of both")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="write the last grids of both runs side by side")
    p.add_argument("--json", action="store_true", help="print the same as JSON")

    p = action("rm", rm, "free the space of a run: what is not needed to sample it, its weights, or all of it")
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/digits")
    p.add_argument(
        "--keep",
        choices=removing.KEEP,
        default="final",
        help="final: weights that are sampled, and all that is small (default); report: no weights; nothing",
    )
    p.add_argument("--yes", action="store_true", help="do not ask")
    p.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    p.add_argument(
        "--force", action="store_true", help="also where it was alive a moment ago, or other runs use its weights"
    )


def ls(args: argparse.Namespace) -> None:
    found, others = runs_.find(args.folder)
    found.sort(key=tables.SORTS[args.sort])
    if args.json:
        damaged = [{"folder": str(path), "why": why} for path, why in others]
        return print(json.dumps({"runs": [tables.as_json(k) for k in found], "others": damaged}, indent=1))
    if found:
        _show(tables.listing(found, args.folder))
    else:
        say(f"no runs in {args.folder}")
    for path, why in others:
        say(f"{path}: {why.removeprefix(f'{path}: ')}")


def show(args: argparse.Namespace) -> None:
    known = runs_.read(args.run)
    missing, here = _outside(known)
    settings = tables.settings_table(known)
    if args.json:
        differ = {key: {"recipe": a, "run": b} for key, a, b in settings.rows}
        more = {"settings": differ, "here": here, "missing": missing, "root": known.about.get("root")}
        return print(json.dumps({**tables.as_json(known), **more, "about": known.about}, indent=1))
    about = tables.as_json(known)
    say(f"{known.folder}: recipe {known.run.name}, {about['state']}, last changed {about['changed']}")
    trained = f"; trained from {known.about['root']}" if known.about.get("root") else ""
    say(f"config digest {about['digest'][:12]}; {known.images:,} images; {words.device_hours(known.hours)}{trained}")
    if known.about.get("parents"):
        say(f"stages not trained here are from {known.about['parents']}")
    machine = known.about.get("environment") or {}
    say("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    rows, kept = known.about.get("rows") or {}, known.about.get("remembered") or {}
    if rows or kept:
        shape = " x ".join(map(str, rows.get("shape", ())))
        n = kept.get("n") or (known.about.get("data") or {}).get("rows")  # older runs have it there alone
        counted = f"{n:,} rows" if n else "rows"
        classes = rows.get("classes") or 0
        of = f", {classes} class{'es' * (classes > 1)}" if classes else ""
        say(f"data: {known.run.data.kind}, {counted} of {shape}{of}")
    for line in here:
        say(f"here: {line}")
    for line in missing:
        say(f"not here: {line}")
    _show(tables.stages_table(known))
    _show(settings)
    _show(tables.files_table(known))


def _outside(known: runs_.Known) -> tuple[list[str], list[str]]:
    """What it needs from outside that is not here, and what is: data, teachers, weights."""
    return needs.listed(folder_.read_run(known.folder), known.folder)


def compare(args: argparse.Namespace) -> None:
    a, b = map(runs_.read, args.runs)
    if args.out and (args.out.suffix.lower() != ".png" or not args.out.absolute().parent.is_dir()):
        raise ConfigError(f"--out: {str(args.out)!r} must be a .png file in a folder that exists")
    settings, (shown, said) = tables.settings_of(a, b), tables.comparison(a, b)
    if args.json:
        differ = {key: [x, y] for key, x, y in settings.rows}
        out = {"runs": [tables.as_json(a), tables.as_json(b)], "settings": differ, "notes": said}
        print(json.dumps(out, indent=1))
    else:
        for table in (settings, *shown):
            _show(table)
        for line in said:
            say(line)
    if args.out:
        try:
            drawn = tables.draw(a, b, args.out)
        except grids.BrokenImage as error:
            raise ConfigError(f"RUN: {error}") from None
        if not drawn:
            raise ConfigError(f"--out: neither {a.folder} nor {b.folder} has a picture to draw")
        print(f"{args.out}: the last grids of both, {drawn} pictures", file=sys.stderr if args.json else sys.stdout)


def _show(table: templates.Table) -> None:
    if table.rows:
        templates.show(table)
    if table.note:
        say(table.note)


def rm(args: argparse.Namespace) -> None:
    removing.check(args.run, args.force or args.dry_run)
    if not (args.yes or args.dry_run or sys.stdin.isatty()):
        raise ConfigError(
            f"--yes: is needed to remove files of {args.run} where nobody can be asked; --dry-run says which"
        )
    with (
        contextlib.nullcontext() if args.dry_run else folder_.locked(args.run, "RUN")
    ):  # it does not begin to train while it is looked at
        plan = removing.plan(args.run, args.keep, args.force)
    if not plan.paths and not plan.pruned:
        return say(f"{args.run}: nothing to remove, all that stands is kept by --keep {args.keep}")
    _say(plan)
    if args.dry_run:
        return say(f"{args.run}: would free {words.size(plan.bytes)}; nothing was deleted")
    if not args.yes and input("delete them? [y/N] ").strip().lower() not in ("y", "yes"):
        return say("nothing was deleted")
    before = pruning.size(args.run)
    try:
        removing.apply(plan)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"RUN: {error}; nothing more was deleted") from None
    after = pruning.size(args.run)
    say(f"{args.run}: freed {words.size(before - after)}, {words.size(after)} left")


def _say(plan: removing.Plan) -> None:
    """What goes, a line each, and what is to be known of it."""
    for path in plan.paths:
        say(f"  {words.size(pruning.size(path)):>8}  {path}{'/' if path.is_dir() and not path.is_symlink() else ''}")
    for folder, files in plan.pruned.items():
        size, names = sum(map(pruning.size, files)), ", ".join(f.stem for f in files)
        say(f"  {words.size(size):>8}  {folder}: {names}")
    for line in plan.said:
        say(f"note: {line}")
