"""What damage to a run's folder does: bits that flip in every kind of its files, cuts, swaps, edits, pipes, folders and links.

A tiny run is trained to its end, and another one half-way. Each damage is done to a copy, and everything that reads a run looks
at it: `cmt ckpt verify`, `cmt runs`, `cmt watch`, and of the parts of the damages that --resume and --report say the `cmt train`
that goes on and the `cmt report`. A damage is seen where `verify` names the file, or where all readers give what they gave.
A reader holds where it says what is wrong, in one line, or gives what it gives of the sound folder. Anything else is a
line and the exit status 1: a traceback, a wait of minutes, another result without a word.

All of it (--n 1000 --others 200) takes about 8 minutes of one core, of which two thirds are the runs that go on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
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
from cmt_fast.report import proving, runs, runs_tables
from cmt_fast.storage import checkpoint, metrics_log, sound, tensor_file
from cmt_fast.watch.state import Watched

LIMIT_S = 300  # of a machine that others share: a pipe is waited for without end
FILE = ROOT / "bench" / "results" / "cpu" / "damage.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=1000, help="bits that flip")
    parser.add_argument("--others", type=int, default=200, help="cuts, swaps, edits, pipes and the like")
    parser.add_argument("--resume", type=int, default=4, help="every how many damages a run goes on after it")
    parser.add_argument("--report", type=int, default=25, help="every how many damages a report is made after it")
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
    """Go on with it; what it says and draws at the end is left out: that is what `report` is for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmt_fast.report.page.write", lambda *a, **k: {})
        return quiet("train", "digits", "--out", str(run), "--stages", "mid", *damaging.overrides())


def _ends(run: Path) -> dict[str, Any]:
    """Weights, EMA, optimizer and rows of the stage that went on."""
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


READERS: dict[str, Callable[[Path], tuple[Any, str]]] = {"verify": _verified, "runs": _listed, "watch": _watched}


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


def look(case: Case, source: Path, known: dict[str, Any], readers: dict[str, Callable], scratch: Path) -> Seen:
    """Do it to a copy of `source` and let these readers look."""
    verdicts, wrong = {}, []
    for name, call in readers.items():
        copy = scratch / "run"
        if name in ("verify", "resume", "report"):  # the others write nothing
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, symlinks=True)
            case.do(copy)
        tensor_file._hashed.clear()  # each of them is a process of its own
        verdict, text = _read(call, copy, known[name])
        if verdict == "other" and _named(case, text, "damaged", "passed over"):
            verdict = "said"
        verdicts[name] = verdict
        if verdict not in ("same", "said"):
            wrong.append(f"{case.name} of {case.file}: {name}: {verdict} {text[-600:]}")
    return Seen(verdicts, wrong)


def resumed(source: Path, ends: dict[str, Any]) -> Callable[[Path], tuple[Any, str]]:
    """The reader that trains on: equal is what ends as the run that was never damaged."""

    def call(run: Path) -> tuple[Any, str]:
        code, said = _train(run)
        return (code, _ends(run) if code == 0 else {}), said

    return call


def run(arguments: argparse.Namespace) -> int:
    begun, counts, wrong = time.process_time(), collections.Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="damage-") as home:
        place = Path(home)
        worlds = made(place)
        print(f"two runs are trained, {time.process_time() - begun:.0f} CPU seconds", flush=True)
        resume = {"resume": resumed(worlds.half, worlds.ends)}
        known: dict[str, Any] = {name: _plain(call, worlds.done, place) for name, call in READERS.items()}
        known |= {"resume": (0, worlds.ends), "report": None}
        drawn = damaging.cases(worlds.done, arguments.n, arguments.others, arguments.seed)
        for i, case in enumerate(drawn):
            readers = dict(READERS)
            if arguments.report and i % arguments.report == 0:
                readers["report"] = _reported
            seen = look(case, worlds.done, known, readers, place / "scratch")
            for line in seen.wrong:
                print(line, flush=True)
            kind = "flips" if case.name == "flip" else "others"
            counts[kind] += 1
            detected = _detected(case, seen)
            counts[f"{kind} named by verify"] += detected
            counts[f"{kind} that no reader relies on"] += not detected
            if not detected and case.name == "flip" and seen.verdicts["verify"] == "same":
                counts["flips that change nothing that is read"] += 1
            wrong += seen.wrong
            _count(counts, seen)
        half = damaging.cases(worlds.half, arguments.n, arguments.others, arguments.seed + 1)
        random.Random(arguments.seed).shuffle(half)
        for case in half[:: arguments.resume] if arguments.resume else ():
            seen = look(case, worlds.half, known, resume, place / "scratch")
            for line in seen.wrong:
                print(line, flush=True)
            wrong += seen.wrong
            _count(counts, seen)
    cpu_s = time.process_time() - begun
    for name, number in sorted(counts.items()):
        print(f"{number:6,}  {name}")
    print(f"{len(wrong)} of them are not held, {cpu_s:.0f} CPU seconds")
    results = about("cpu") | {
        "seed": arguments.seed,
        **{k.replace(" ", "_").replace(":", ""): v for k, v in counts.items()},
    }
    write_json(arguments.json, results | {"not_held": len(wrong), "cpu_s": round(cpu_s, 1)})
    return int(bool(wrong))


def _plain(call: Callable[[Path], tuple[Any, str]], run: Path, place: Path) -> Any:
    copy = place / "scratch" / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    return call(copy)[0]


def _detected(case: Case, seen: Seen) -> bool:
    return seen.verdicts["verify"] == "said"


def _count(counts: collections.Counter[str], seen: Seen) -> None:
    for name, verdict in seen.verdicts.items():
        counts[f"{name}: {verdict}"] += 1
