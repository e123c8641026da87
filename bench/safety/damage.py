"""What damage to a run's folder does: bits that flip in every kind of its files, cuts, swaps, edits, pipes, folders and links.

A tiny run is trained to its end, and another one half-way. Each damage is done to a copy, and `cmt ckpt verify`, `cmt runs` and
`cmt watch` look at it. It is seen where `verify` names the file, or where what is read from the file is what was read before, as
of a blank that became another. A reader holds where it says what is wrong, in one line, or gives what it gives of the sound
folder. Of each kind of damage to each kind of file, as many as --resume and --report say, the `cmt train` that goes on and the
`cmt report` are looked at too: it ends with the weights of the run that was never damaged, or in one line that names the file.
Anything else is a line and the exit status 1: a traceback, a wait of minutes, another result without a word. Two pictures that
changed places alone are not seen: nothing is read from them.

Readers take 0.06 CPU seconds a damage, a run that goes on about 1 and a report 2: all of it (--n 1000 --others 520) about two
minutes of one core.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.harness.results_file import ROOT, about, write_json
from bench.safety import damaging
from bench.safety.damaging import Case, quiet
from cmt_fast.config.errors import ConfigError
from cmt_fast.report import page, proving, runs, runs_tables
from cmt_fast.run.workspace import open_run
from cmt_fast.storage import checkpoint, metrics_log, sound, tensor_file
from cmt_fast.watch.state import Watched

LIMIT_S = 60  # of a machine that others share: a pipe is waited for without end
BULK = (
    8  # `cmt runs` and `cmt watch` read no byte of tensors and pictures: after every so manieth flip in them they look
)
FILE = ROOT / "bench" / "results" / "cpu" / "damage.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=1000, help="bits that flip")
    parser.add_argument("--others", type=int, default=520, help="cuts (two fifths), swaps, edits, pipes and the like")
    parser.add_argument("--resume", type=int, default=30, help="after how many damages a run goes on")
    parser.add_argument("--report", type=int, default=4, help="after how many damages a report is made")
    parser.add_argument("--run", type=Path, help="a finished run whose copies are damaged, in the place of its own")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--json", type=Path, default=FILE, help="where to write")


class Worlds(NamedTuple):
    """done: a finished run with its report; half: one that goes on; ends: what that one ends with where nothing is damaged."""

    done: Path
    half: Path
    ends: dict[str, Any]


def made(place: Path) -> Worlds:
    """Train both. Raises AssertionError where that fails."""
    done, half = place / "done", place / "half"
    code, said = quiet("train", "digits", "--out", str(done), "--stages", "pre,mid", *damaging.overrides())
    assert code == 0, said
    shutil.copytree(done, half)
    for gone in ("report.html", "report.md"):
        (half / gone).unlink()
    shutil.rmtree(half / "mid")
    whole, written = checkpoint.save, []

    def save(stage: Path, step: int, *arguments: Any, **more: Any) -> Path:
        out = whole(stage, step, *arguments, **more)
        if stage.name == "mid":
            written.append(step)
            if step == 10:
                raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        code, said = quiet("train", "digits", "--out", str(half), "--stages", "mid", *damaging.overrides())
    assert written == [5, 10], said
    copy = place / "ends"
    shutil.copytree(half, copy)
    assert _train(copy)[0] == 0
    return Worlds(done, half, _ends(copy))


def _train(run: Path) -> tuple[int, str]:
    """Go on with it; of the page at its end only which rows are damaged: the rest is what `report` is for."""

    def told(folder: Path, **_: Any) -> None:
        page.tell_lost(page.standings(open_run(folder))[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", told)
        return quiet("train", "digits", "--out", str(run), "--stages", "mid", *damaging.overrides())


def _ends(run: Path) -> dict[str, Any]:
    """Weights, EMA, optimizer and rows of the stage that went on. Rows that were lost are said; weights never differ."""
    found = checkpoint.newest(run / "mid")
    rows = [{k: v for k, v in row.items() if k != "wall"} for row in metrics_log.rows(run / "mid" / "metrics.jsonl")]
    return {"files": found and found.manifest["files"], "step": found and found.manifest["step"], "rows": rows}


# ------------------------------------------------------------------------------------------------ readers


def _verified(run: Path) -> tuple[Any, str]:
    found = list(proving.run(run))
    return [(str(p.path.relative_to(run)), bool(p.wrong)) for p in found], "".join(
        f"{p.path}: {p.wrong}\n" for p in found if p.wrong
    )


def _listed(run: Path) -> tuple[Any, str]:
    known = runs_tables.as_json(runs.read(run))
    return {k: known[k] for k in ("digest", "stages")}, str(known)


def _watched(run: Path) -> tuple[Any, str]:
    state = Watched(run).look(clock=0.0)
    stages = [(s.name, s.at.state, s.at.nimg, s.begun, list(s.losses), s.evaluations, s.at.hours) for s in state.stages]
    return (state.name, stages, state.steps, state.teacher), " ".join(s.at.state for s in state.stages)


def _reported(run: Path) -> tuple[Any, str]:
    """The page is written, whatever is damaged that it can do without or make anew: what it says may differ."""
    return None, quiet("report", str(run))[1]


Reader = Callable[[Path], tuple[Any, str]]
READERS: dict[str, Reader] = {"verify": _verified, "runs": _listed, "watch": _watched}


class Slow(Exception):
    """A reader waits for what never comes."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _read(call: Callable[[Path], tuple[Any, str]], run: Path, known: Any) -> tuple[str, str]:
    """(`same`, `said`, or what is wrong, what was said) of one reader."""
    said = io.StringIO()
    try:
        with _limited(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            value, text = call(run)
    except (ConfigError, sound.CheckpointError) as error:
        return "said", str(error)
    except Slow:
        return "waits", ""
    except BaseException:  # SystemExit too: a reader ends in a line or a result
        return "traceback", traceback.format_exc()
    text += said.getvalue()
    return ("same" if value == known else "other"), text


def _named(case: Case, text: str, *more: str) -> bool:
    """Whether what was said names the file, or the checkpoint that it is of."""
    parts = Path(case.file).parts
    names = [parts[-1], *(p for p in parts if p.startswith("step-")), Path(case.file).stem, *more]
    return any(name in text for name in names)


class Seen(NamedTuple):
    """Of one case: the verdict of each reader, and what is wrong."""

    verdicts: dict[str, str]
    wrong: list[str]


def _content(file: Path) -> Any:
    """What is read from a file; None for what cannot be read, or is not there."""
    try:
        if file.suffix == ".json":
            return sound.read(file, key="")
        if file.suffix == ".jsonl":
            return [metrics_log.parsed(line, metrics_log.seeds(file.parent)) for line in sound.data(file).splitlines()]
        return sound.data(file)
    except (OSError, sound.Unsound):
        return None


def look(case: Case, source: Path, known: dict[str, Any], readers: dict[str, Reader], copy: Path) -> Seen:
    """Let these readers look at a copy of `source` to which it was done."""
    verdicts, wrong = {}, []
    for name, call in readers.items():
        tensor_file._hashed.clear()  # each of them is a process of its own
        verdict, text = _read(call, copy, known[name])
        if verdict == "other" and _named(case, text, "damaged", "passed over"):
            verdict = "said"
        verdicts[name] = verdict
        if verdict not in ("same", "said"):
            wrong.append(f"{case.name} of {case.file}: {name}: {verdict} {text[-600:]}")
    picture = case.name == "swap" and case.file.endswith(".png")
    if verdicts.get("verify") == "same" and not picture and _content(copy / case.file) != _content(source / case.file):
        wrong.append(f"{case.name} of {case.file}: not named, and something else is read")
    return Seen(verdicts, wrong)


def chosen(cases: list[Case], count: int, seed: int) -> list[Case]:
    """So many of them, of as many kinds of damage and of file as there are."""
    draw, by = random.Random(seed), dict[tuple[str, str], list[Case]]()
    for case in draw.sample(cases, len(cases)):
        by.setdefault((case.name, next(iter(damaging.kinds([case.file])))), []).append(case)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*by.values()))
    return [case for case in rounds if case][:count]


def _resumed(run: Path) -> tuple[Any, str]:
    """Train on. A run that was lost a row says so; its weights are those of the run that was never damaged."""
    code, said = _train(run)
    return (code, _ends(run) if code == 0 else {}), said


def run(arguments: argparse.Namespace) -> int:
    begun, counts, wrong = time.process_time(), collections.Counter[str](), list[str]()

    def note(seen: Seen) -> None:
        counts.update(f"{name}: {verdict}" for name, verdict in seen.verdicts.items())
        wrong.extend(seen.wrong)
        for line in seen.wrong:
            print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="damage-") as home:
        place, copy = Path(home), Path(home) / "scratch"
        worlds = Worlds(arguments.run, arguments.run, {}) if arguments.run else made(place)
        done = place / "whole"
        shutil.copytree(worlds.done, done)
        print(f"runs are trained, {time.process_time() - begun:.0f} CPU seconds", flush=True)
        damaging.linked(done, copy)
        known: dict[str, Any] = {name: call(copy)[0] for name, call in READERS.items()} | {"report": None}
        drawn = damaging.cases(done, arguments.n, arguments.others, arguments.seed)
        for i, case in enumerate(drawn):
            bulk = case.name == "flip" and case.file.endswith((".safetensors", ".png")) and i % BULK
            readers = {"verify": _verified} if bulk else READERS
            damaging.linked(done, copy)
            case.do(copy)
            note(seen := look(case, done, known, readers, copy))
            kind = "flips" if case.name == "flip" else "others"
            counts[kind] += 1
            counts["truncations"] += case.name == "truncation"
            counts[f"{kind} named by verify" if _detected(seen) else f"{kind} that change nothing that is read"] += 1
        for case in chosen(drawn, arguments.report, arguments.seed):
            note(_done(case, worlds.done, known, {"report": _reported}, copy))
        half = (
            damaging.cases(worlds.half, arguments.n, arguments.others, arguments.seed + 1) if arguments.resume else []
        )
        for case in chosen(half, arguments.resume, arguments.seed):
            seen = _done(case, worlds.half, {"resume": (0, worlds.ends)}, {"resume": _resumed}, copy)
            with contextlib.suppress(sound.CheckpointError):  # of a run that was not gone on with
                ends = checkpoint.complete(copy / "mid").manifest["files"]
                if seen.verdicts["resume"] == "said" and ends != worlds.ends["files"]:
                    seen.wrong.append(f"{case.name} of {case.file}: resume: other weights")
            note(seen)
    return _told(arguments, counts, wrong, time.process_time() - begun)


def _done(case: Case, source: Path, known: dict[str, Any], readers: dict[str, Reader], copy: Path) -> Seen:
    """`look`, at a copy that may be written to."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, symlinks=True)
    case.do(copy)
    return look(case, source, known, readers, copy)


def _told(arguments: argparse.Namespace, counts: collections.Counter[str], wrong: list[str], cpu_s: float) -> int:
    """Print and write the counts. Returns the exit status."""
    for name, number in sorted(counts.items()):
        print(f"{number:6,}  {name}")
    print(f"{len(wrong)} of them are not held, {cpu_s:.0f} CPU seconds")
    results = about("cpu") | {"seed": arguments.seed, "not_held": len(wrong), "cpu_s": round(cpu_s, 1)}
    named = {name.replace(" ", "_").replace(":", ""): number for name, number in sorted(counts.items())}
    write_json(arguments.json, results | named)
    return int(bool(wrong))


def _detected(seen: Seen) -> bool:
    return seen.verdicts["verify"] == "said"
