"""`cmt train` and `cmt search`: what changes weights."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import cmt_kernels
import yaml

from cmt_fast.cli import look
from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import errors, fingerprint, loading, paths, recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.cost import disk, estimate, fitting, flops, hardware, rounded
from cmt_fast.data import classes, start
from cmt_fast.data.loaders import check_loader
from cmt_fast.engine import ShardingPlan, sharding
from cmt_fast.evaluation import judges
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.report import page
from cmt_fast.run import absent, changes, folder, needs, workspace
from cmt_fast.run.resolved import ResolvedStage, resolve
from cmt_fast.runtime import distributed, machine, memory, once, progress, streams, words
from cmt_fast.storage import checkpoint, files, filesystem
from cmt_fast.teacher import precision, solver_record
from cmt_fast.train import looking, loop, profiler, saving
from cmt_fast.usage import bills

REFRESH_S = 30  # seconds after which the page of a run that trains loads itself anew


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=train)
    p.add_argument("recipe", nargs="?", help="name or YAML file; without one the names are listed")
    add_overrides(p)
    p.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    p.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with a run, wherever its folder is now, by its own recipe"
    )
    p.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help=f"where relative paths of the recipe start (default: {paths.VARIABLE}, else the current folder)",
    )
    p.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="go on with another lr, length, batch or precision, from the newest checkpoint on; may be given several times",
    )
    p.add_argument("--stages", help="comma-separated stages (default: all of the recipe)")
    p.add_argument(
        "--from",
        dest="parents",
        type=Path,
        metavar="RUN",
        help="take the stages that are not trained here from another run",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run, the op table, the cost and what is missing; write one picture of the data",
    )

    p.add_argument(
        "--profile",
        action="store_true",
        help="profile some steps of the first stage; write a trace and a table of ops to its folder",
    )
    p.add_argument(
        "--log-every-s",
        metavar="N",
        help=f"seconds between lines where the output is no terminal (default: {progress.EVERY_S:.0f})",
    )
    p.add_argument(
        "--disk-wait",
        default="10m",
        metavar="TIME",
        help="how long a save waits for room on a full disk, as 90s, 10m, 2h; 0 does not (default: 10m)",
    )
    p.add_argument("--profile-steps", type=int, default=4, metavar="N", help="steps to profile (default: 4)")


def train(args: argparse.Namespace) -> None:
    if args.profile_steps < 1:
        raise ConfigError(f"--profile-steps: {args.profile_steps} is not a positive number")
    if args.recipe is None and args.resume is None:
        print("\n".join(recipes.listed()))
        raise ConfigError("cmt train: which recipe? name one of these, or a YAML file (`cmt recipes new` writes one)")
    progress.set_every_s(args.log_every_s)
    with saving.patience(args.disk_wait):
        _train(args)


def _train(args: argparse.Namespace) -> None:
    begun = time.monotonic()
    run, out, parents = _asked(args)
    run, changing = changes.asked(run, out, args.change)
    names = _stages(run, args.stages)
    if parents:
        folder.stored_run(parents)
    asked, done = names, [name for name in names if args.resume and _finished(resolve(run, name, out))]
    _as_trained(out, run, done)
    if done == names:
        page.write(out, training=True)  # for which no data need be here
        return progress.say(f"nothing is left to train: {', '.join(names)} of {out} are finished")
    names = [name for name in names if name not in done]  # what a finished stage read need not be here
    lacking = needs.missing(run, out, parents, names)
    if _goes_on(run, out, names):  # `_judge` says what of it is not here
        lacking = [need for need in lacking if not need.key.startswith("eval.")]
    if lacking and not args.dry_run:
        if getattr(run.data, "expects", None) or not {"data.path", "data.kind"} & {need.key for need in lacking}:
            workspace.Workspace(run, out, parents, absent.rows(run))  # what cannot be meant is said first
        raise needs.error(lacking)
    distributed.start(machine.device(run.device), run.timeout_s)
    names = distributed.text_of_first(",".join(names)).split(",")  # others may see late what is finished
    # no heart beats before the run is locked: until then it may be another's
    with progress.phase("reading the data"), start.together(copy=not args.dry_run):
        work = workspace.Workspace(run, out, parents, absent.rows(run) if args.dry_run else None)
    with progress.phase("reading what the stages build on"):
        work.changing = changing
        _check(work, names, not lacking)
    if args.dry_run:
        return _dry_run(work, names, lacking, out) if distributed.rank() == 0 else None
    work.compare()
    _judge(work, names)
    if distributed.rank() == 0:
        for name in done:
            progress.say(f"{name:>8} done")
        _ops(work.device.type)
        _classes(work)
    distributed.agreed(
        lambda: None if distributed.rank() else _disk(work, [n for n in names if not _finished(work.stage(n))])
    )
    if work.device.type == "cpu":
        memory.keep_freed()
    draw = functools.partial(page.write, out, judge=False, refresh_s=REFRESH_S)
    try:
        with streams.unless_lost():
            loop.train(work, names, profiler.Profile(args.profile_steps) if args.profile else None, draw)
    except memory.OutOfMemory as error:
        raise memory.OutOfMemory(error.stage, error.moment, _would_fit(work, error)) from error
    with streams.unless_lost():
        _page(work, out)
    if distributed.rank() == 0:
        progress.say(_done(work, asked, time.monotonic() - begun))


def _would_fit(work: workspace.Workspace, error: memory.OutOfMemory) -> str:
    """What ran out, the parts of the stage's memory, the settings that would fit, and what the same command goes on from."""
    n, local = distributed.size(), distributed.local_size()
    at = hardware.this(work.device) or hardware.bare(work.device)
    card = at._replace(memory=min(memory.most(work.device, local), sharding.memory_bytes(work.device)))
    rows = estimate.Rows(work.data.shape, work.data.classes, work.data.n or None, None, "")
    steps = checkpoint.steps(work.folder / error.stage)
    kept = (
        f"step {steps[-1]:,} is on disk, from which the same command goes on with what needs no new folder"
        if steps
        else ""
    )
    begun = tuple(name for name in work.run.stages if checkpoint.steps(work.folder / name))
    text = fitting.told(fitting.Case(work.run, error.stage, rows, card, n, begun), error.moment)
    peak = f"{error.why}; the process held {sharding.gb(memory.peak(work.device))} at most; {text}"
    return f"{peak}. {kept or 'Nothing of the stage is on disk yet'}"


def _stages(run: Run, text: str | None) -> list[str]:
    """The stages that --stages names, in the run's order. Raises ConfigError."""
    have = list(run.stages)
    names = text.split(",") if text else have
    for name in names:
        if name not in have:
            raise ConfigError(
                f"--stages: {name!r} is not valid; this recipe has {', '.join(have)}{errors.nearest(name, have)}"
            )
    return [name for name in have if name in names]


def _finished(stage: ResolvedStage) -> bool:
    """Whether nothing of a stage is left to do, its last look too, as this process sees it: one rank asks for all of them."""
    try:
        return not looking.unmade(stage, checkpoint.complete(stage.folder).manifest)
    except checkpoint.CheckpointError:
        return False


def _goes_on(run: Run, out: Path, names: list[str]) -> bool:
    """Whether a run that has begun goes on without what its evaluations need."""
    return run.eval.on_error == "continue" and any(checkpoint.steps(out / name) for name in names)


def _judge(work: workspace.Workspace, names: list[str]) -> None:
    """Raises ConfigError for what evaluations and pictures need and cannot have, before the first step. A run that has begun
    goes on without it where `eval.on_error` is continue, and says so."""
    try:
        with progress.phase("checking what evaluation needs"):
            judges.check_files(work.run.eval)
            distributed.agreed(work.judging.rehearse, ConfigError, "another process cannot judge, its output says why")
    except ConfigError as error:
        if not _goes_on(work.run, work.folder, names):
            raise
        if distributed.rank() == 0:
            text = f"evaluations will fail ({error}); training goes on (eval.on_error: continue)"
            print(f"cmt: {text}", file=sys.stderr, flush=True)


def _as_trained(out: Path, run: Run, done: list[str]) -> None:
    """Raises ConfigError for a setting that comes too late: of a stage of a run that is resumed, and finished."""
    stored = folder.stored_run(out) if done else run
    for name in done:
        late = fingerprint.changed(fingerprint.content(stored, name), fingerprint.content(run, name))
        if late:
            raise ConfigError(f"--resume: {name} of {out} is finished, by other settings ({'; '.join(late[:3])})")


def _asked(args: argparse.Namespace) -> tuple[Run, Path, Path | None]:
    """The run to train, its folder, and where stages are that it does not train: of a recipe, or of a run that goes on.

    Raises ConfigError for arguments that do not go together.
    """
    root, again = paths.given(args.root), args.resume
    if again is None:
        run = loading.load(args.recipe, args.overrides)
        out = args.out or folder.default(run)
        run, notes = changes.adopted(run, out)
        for note in notes if once.rank() == 0 else ():
            print(f"note: {note}", file=sys.stderr)
        return paths.rebased(run, root) if root else run, out, args.parents
    if args.out and args.out.resolve() != again.resolve():
        raise ConfigError(f"--out: {again} goes on in its own folder; train a recipe to begin another")
    folder.stored_run(again)
    if args.recipe and "=" not in args.recipe:
        raise ConfigError(f"--resume: {again} goes on by its own recipe; leave {args.recipe!r} out")
    more = [args.recipe] if args.recipe else []  # its place is an override's where no recipe is named
    run = loading.load(str(again / folder.RUN_FILE), [*more, *args.overrides])
    home = folder.about_run(again).get("root")
    if root or home:
        run = paths.rebased(run, root or Path(home), found=root is None)
    return run, again, args.parents or folder.parents_of(again)


def _check(work: workspace.Workspace, names: list[str], complete: bool) -> None:
    """Raises ConfigError for what these stages cannot do here, before the first of them begins.

    complete: all that they read from outside is here; else only what does not depend on it is looked at.
    """
    for i, name in enumerate(names if complete else []):
        stage = work.stage(name)
        for parent in stage.called.values():
            if "/" not in parent and parent not in names[:i]:
                work.finished(parent)
        work.external_inputs(stage)
        work.sharding_plan(stage)
    for stage in map(work.stage, names):
        stage.grad_accum_steps(distributed.size())
        precision.check(stage.name, stage.config, work.device)
    judges.check_rows(work.data.n, work.run.eval.reference)
    if complete and any(OBJECTIVES[work.stage(name).config.objective.kind].draws == "data" for name in names):
        check_loader(work.run.loader, work.data)


def _page(work: workspace.Workspace, out: Path) -> None:
    """The report of what was trained; where it cannot be made, that is said, and raised where `eval.on_error` is stop."""
    try:
        page.write(out, training=True)
    except Exception as error:
        if work.run.eval.on_error == "stop" or distributed.lost(error):
            if files.is_full(error):  # what was trained is on disk: no scheduler has to train it again
                raise looking.Failed(f"the report of {out}: {looking.told(error)}") from error
            raise
        if distributed.rank() == 0:
            text = f"{looking.told(error)}; all is trained, `cmt report {out}` judges it again"
            print(f"cmt: the report failed ({text})", file=sys.stderr, flush=True)


def _ops(device: str) -> None:
    """Which backend computes which op, those of a backend together."""
    by_name: dict[str, list[str]] = {}
    for op, name in cmt_kernels.table(device).items():
        by_name.setdefault(name, []).append(op)
    for name, ops in sorted(by_name.items()):
        progress.say(f"ops: {name:9} {' '.join(ops)}")
    for line in filter(None, (cmt_kernels.without_native(device), machine.other_kernels())):
        progress.say(f"note: {line}")


def _classes(work: workspace.Workspace) -> None:
    progress.say(classes.line(work.data))
    note = classes.gaps(work.data)
    if note and work.run.data.class_ids is None:
        progress.say(f"note: {note}")


def _disk(work: workspace.Workspace, names: list[str]) -> None:
    """What the run's disk does and has, in a line, before anything depends on it. Raises DiskFull."""
    there = next(f for f in (work.folder.absolute(), *work.folder.absolute().parents) if f.is_dir())
    full: OSError | None = None
    with files.unless_refused():  # the lock says that nothing can be written
        try:
            found = filesystem.probe(there)
            filesystem.adapt(found)
            print(filesystem.line(work.folder, found))
        except OSError as error:
            if not files.is_full(error):
                raise
            full = error
    note = disk.check([work.stage(name) for name in names], work.parameters, work.folder)
    if full:  # and nothing says how much is missing
        raise full
    if note:
        print(f"note: {note}")


def _done(work: workspace.Workspace, names: list[str], seconds: float) -> str:
    """The last line: what this command took, and what its stages have cost in all, restarts too."""
    found = [bills.of_stage(work.folder / n, checkpoint.complete(work.folder / n).manifest) for n in names]
    cost = {unit: bills.total([b for b in found if b], unit).hours for unit in words.UNITS}
    spent = words.device_hours({unit: h for unit, h in cost.items() if h})
    return f"done in {words.duration(seconds)}; {', '.join(names)}: {spent} in all"


def _dry_run(work: workspace.Workspace, names: list[str], lacking: list[needs.Need], out: Path) -> None:
    print(yaml.safe_dump(loading.dump(work.run), sort_keys=False).rstrip())
    print(f"digest: {fingerprint.digest(work.run)}")
    _ops(work.device.type)
    rows = f"{work.data.n:,} rows" if work.data.n else "rows as data.expects has them,"
    print(f"network: {work.parameters:,} parameters; device {work.device}; {rows} of {work.data.shape}")
    _classes(work)
    for stage in map(work.stage, names):
        c = flops.calls(stage)
        how = " (compiled)" if stage.config.compile else ""
        print(
            f"{stage.name:>8}: {c['steps']:,} steps, {c['images']:,} images, {c['forwards']:,.0f} network forwards{how}"
        )
        t = stage.config.trajectories
        if t and t.nfe == "auto":
            print(f"{'':>8}  {_auto(stage)}")
        try:
            choice = work.sharding_plan(stage)
            sizing = choice.lines(work.parameters, distributed.size())
        except ConfigError:
            choice, sizing = None, []  # a network that it counts is not here
        for line in [*sizing, _step(stage), *_bill(work, stage, choice)]:
            print(f"{'':>8}  {line}")
    if work.data.n:
        named = out if out.name else out.resolve()
        look.of_run(work, named.with_name(f"{named.name}-look.png"))
    for need in lacking:
        print(f"not here: {need}")


def _auto(stage: ResolvedStage) -> str:
    kept = solver_record.read(stage.folder)
    if kept:
        length = f", {kept.images:,} images" if kept.images else ""
        return f"nfe auto was resolved: {solver_record.override(stage.name, kept.choice)}{length}"
    budget = stage.trajectories.budget_forwards
    if budget is not None:
        held = f"its images are what {budget:,} forwards hold"
        return f"nfe auto is resolved when the stage begins, and {held}; counted here with {stage.trajectories.calls}"
    return f"nfe auto is resolved when the stage begins; counted here with {stage.trajectories.calls}"


def _step(stage: ResolvedStage) -> str:
    n = distributed.size()
    batch, parts = stage.config.batch, stage.grad_accum_steps(n)
    return f"a step: {batch} rows = {n} process{'es' * (n > 1)} x {parts} pass{'es' * (parts > 1)} x {batch // (n * parts)}"


def _bill(work: workspace.Workspace, stage: ResolvedStage, choice: ShardingPlan | None) -> list[str]:
    """A stage's FLOPs, bytes in memory and on disk and, on a device that the cost model knows, hours: a short `cmt estimate`."""
    rows = estimate.Rows(work.data.shape, work.data.classes, work.data.n or None, None, "")
    known, _ = estimate.networks(stage, rows)
    each, images = flops.flops_image(flops.terms(stage), known), flops.calls(stage)["images"]
    text = f"work: {each / 1e9:,.4g} GFLOP an image, {each * images / 1e15:,.4g} PFLOP"
    at, n = hardware.this(work.device), distributed.size()
    if at is not None:
        bill, sized, _ = estimate.stage_bill(stage, rows, at, n, flops.AS_IT_RUNS)
        text = f"{text}; {bill.hours:,.3g} h on {n} x {at.name} ({bill.mark})"
        choice = choice or sized
    card = at or hardware.bare(work.device)
    choice = choice or estimate.sharding_plan(stage, rows, known, card, n)
    held = estimate.held(stage, rows, known, choice, card._replace(memory=choice.memory_bytes), n)
    notes = filter(None, [rounded.note(stage, n)])
    return [text, *notes, held.line(), disk.line(stage, tuple(rows.shape), known["student"].parameters, work.folder)]
