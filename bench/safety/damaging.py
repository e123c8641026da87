"""A finished and an unfinished tiny run, and the damages that are done to their files."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cmt_fast import cli

# nothing is read from these: they are written anew, or their time alone counts
UNREAD = ("report.html", "report.md", "heartbeat", ".lock")
STEPS, BATCH = 20, 32

SETTINGS = [
    "model.width=16", "model.depth=1", "model.heads=2", "eval.n=64", "eval.n_during=64", "eval.batch=64", "device=cpu",
    "sampler.teacher_steps=2", "pre.ema=[{kind: power, sigma_rel: 0.1}, {kind: power, sigma_rel: 0.05}]",
    f"pre.snapshot_every_nimg={10 * BATCH}",
]  # fmt: skip


def overrides() -> list[str]:
    """Stages of a few steps, with rows, snapshots, pictures and evaluations."""
    out = list(SETTINGS)
    for name in ("pre", "mid"):
        out += [f"{name}.images_nimg={STEPS * BATCH}", f"{name}.batch={BATCH}", f"{name}.warmup_nimg=0"]
        out += [f"{name}.checkpoint_every_nimg={5 * BATCH}", f"{name}.eval_every_nimg={10 * BATCH}"]
        out += [f"{name}.grid_every_nimg={10 * BATCH}"]
    return [*out, "mid.trajectories.pool_steps=4"]


def quiet(*arguments: str) -> tuple[int, str]:
    """A command in this process: its exit code, and all that it said. Raises what would be a traceback."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(list(arguments))
    return code, said.getvalue()


class Case(NamedTuple):
    """One damage. name: of its kind; file: what it is done to, relative to the run; do: does it, in a copy of the run."""

    name: str
    file: str
    do: Callable[[Path], None]


def files_of(run: Path) -> list[str]:
    """Every file of a run, relative, but those that nothing is read from."""
    found = (str(p.relative_to(run)) for p in sorted(run.rglob("*")) if p.is_file() and not p.is_symlink())
    return [name for name in found if Path(name).name not in UNREAD and not name.startswith("report/")]


def kinds(files: list[str]) -> dict[str, list[str]]:
    """By what a file is: bits fall as often in each kind, or the largest would get them all."""
    out: dict[str, list[str]] = {}
    for name in files:
        path = Path(name)
        kind = "picture" if path.suffix == ".png" else path.name
        if path.parent.name == "reference" and kind != "picture":
            kind = f"reference{path.suffix}"
        if "snapshots" in path.parts:
            kind = f"snapshot {path.name}"
        out.setdefault(kind, []).append(name)
    return out


def put(file: Path, data: bytes) -> None:
    """Other bytes under this name, and no other one of the same file."""
    file.unlink()
    file.write_bytes(data)


def linked(source: Path, copy: Path) -> None:
    """A run whose files are those of another, until one is `put`: for who reads it alone."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, symlinks=True, copy_function=os.link)


def flip(name: str, draw: random.Random) -> Callable[[Path], None]:
    """One bit of a file."""
    place = draw.random()

    def do(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        bit = int(place * len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        put(run / name, bytes(data))

    return do


def truncate(name: str, draw: random.Random) -> Callable[[Path], None]:
    """A file that ends early, one in ten of them at once."""
    share = 0.0 if draw.random() < 0.1 else draw.random()

    def do(run: Path) -> None:
        data = (run / name).read_bytes()
        put(run / name, data[: int(share * len(data))])

    return do


def swap(name: str, other: str) -> Callable[[Path], None]:
    """Two files of one kind, each in the place of the other."""

    def do(run: Path) -> None:
        (run / name).rename(run / "x")
        (run / other).rename(run / name)
        (run / "x").rename(run / other)

    return do


def edit(name: str, draw: random.Random) -> Callable[[Path], None]:
    """Another digit, or JSON of another kind, in a text that stays valid."""
    place, kind = draw.random(), draw.randrange(5)

    def do(run: Path) -> None:
        text = (run / name).read_bytes()
        digits = [i for i, c in enumerate(text) if 0x31 <= c <= 0x38]
        if kind == 0:
            text = b"[" * 100_000
        elif kind == 1:
            text = json.dumps([1, {"a": None}]).encode()
        elif kind == 2:
            text = b'{"key": 3, "few": [], "bill": "x", "run": 4, "files": []}\n'
        elif digits:
            at = digits[int(place * len(digits))]
            text = text[:at] + bytes([text[at] + 1]) + text[at + 1 :]
        put(run / name, text)

    return do


def instead(name: str, kind: str) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def do(run: Path) -> None:
        path = run / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "link":
            path.symlink_to("/dev/zero")
        else:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            try:
                socket.socket(socket.AF_UNIX).bind(path.name)
            finally:
                os.chdir(here)

    return do


def misplaced(run: Path) -> Iterator[Case]:
    """Checkpoints that lie where they do not belong, and names that are none."""
    last = {
        stage: sorted(p.name for p in (run / stage / "checkpoints").glob("step-*"))[-1]
        for stage in ("pre", "mid")
        if (run / stage).is_dir()
    }
    for stage, other in itertools.permutations(last, 2):
        newest, source = last[stage], f"{other}/checkpoints/{last[other]}"
        place = f"{stage}/checkpoints"

        def renamed(copy: Path, place: str = place, newest: str = newest, to: str = "step-00000999") -> None:
            (copy / place / newest).rename(copy / place / to)

        def short(copy: Path, place: str = place, newest: str = newest) -> None:
            renamed(copy, place, newest, "step-999")

        def odd(copy: Path, place: str = place) -> None:
            (copy / place / "step-²").mkdir()

        def foreign(copy: Path, place: str = place, source: str = source) -> None:
            shutil.copytree(copy / source, copy / place / "step-00000021")

        def exact(copy: Path, place: str = place, source: str = source, newest: str = newest) -> None:
            shutil.rmtree(copy / place / newest)
            shutil.copytree(copy / source, copy / place / newest)

        yield Case("renamed ahead", f"{place}/step-00000999", renamed)
        yield Case("renamed short", f"{place}/step-999", short)
        yield Case("an odd name", f"{place}/step-²", odd)
        yield Case("of another stage", f"{place}/step-00000021", foreign)
        yield Case("of another stage, same name", f"{place}/{newest}", exact)


def cases(run: Path, n: int, others: int, seed: int) -> list[Case]:
    """n flips over all kinds of files, and so many other damages, drawn from a seed."""
    draw, by_kind = random.Random(seed), kinds(files_of(run))
    names = list(by_kind)
    pick = lambda i: draw.choice(by_kind[names[i % len(names)]])
    out = [Case("flip", name, flip(name, draw)) for i in range(n) for name in [pick(i)]]
    texts = [name for name in names if not name.endswith((".safetensors", "picture", ".block"))]
    several = [name for name in names if len(by_kind[name]) > 1]
    out += list(misplaced(run))[:others]
    for i in range(others - 10):
        what = (0, 1, 0, 2, 3)[i % 5]
        if what == 0:
            name = pick(i // 2)
            out.append(Case("truncation", name, truncate(name, draw)))
        elif what == 1:
            a, b = draw.sample(by_kind[several[i // 5 % len(several)]], 2)
            out.append(Case("swap", a, swap(a, b)))
        elif what == 2:
            name = draw.choice(by_kind[texts[i // 5 % len(texts)]])
            out.append(Case("edit", name, edit(name, draw)))
        else:
            name, kind = pick(i // 5), ("pipe", "folder", "loop", "link", "socket")[i // 5 % 5]
            out.append(Case(f"a {kind}", name, instead(name, kind)))
    return out
