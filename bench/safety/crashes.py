"""Every state in which a crash can leave the folder of a stage that saves a checkpoint, and what is loaded from each.

A save is done once, and what the system was asked for is noted: files written, entries of folders made, renamed and removed,
and what was synced in between. A disk that loses power keeps what was synced; of the rest it keeps any part: an entry or none,
and of a file that was not synced nothing, all, or its first half and zeros. Each state that can be left after each call is built
from that, in a folder of its own, and must load the checkpoint of before or the new one, to the bit; then the next process
clears the rest away, saves, and that is loaded. Where a call leaves more states than its share they are drawn by --seed.

All of it (--n 900, some 600 states) takes about 5 CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench.harness.results_file import ROOT, about, write_json
from cmt_fast.storage import checkpoint, debris, tensor_file

FILE = ROOT / "bench" / "results" / "cpu" / "crashes.json"
CUTS = ("nothing", "torn", "whole")  # what is left of a file that was not synced


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own."""
    parser.add_argument("--n", type=int, default=900, help="states, at most; fewer where there are no more")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--json", type=Path, default=FILE, help="where to write")


class Call(NamedTuple):
    """One thing that the system was asked for. kind: `data` (inode, bytes), `entry` (folder's inode, {name: inode or None}),
    `sync` (inode)."""

    kind: str
    inode: int
    what: Any = None


class Disk:
    """What a folder holds by inode, and the calls that changed it, told from what it holds before and after each."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[Call]()
        self.begun = self.held = self._look()

    def _look(self) -> tuple[dict[int, bytes], dict[int, dict[str, int]]]:
        """inode -> bytes of a file; inode -> entries of a folder."""
        files, folders = {}, dict[int, dict[str, int]]()
        for place, _, names in os.walk(self.root):
            here = os.stat(place).st_ino
            folders[here] = {e.name: e.inode() for e in os.scandir(place)}
            for name in names:
                path = Path(place, name)
                files[path.stat().st_ino] = path.read_bytes()
        return files, folders

    def note(self) -> None:
        """What has changed since the last look."""
        files, folders = self._look()
        before_files, before = self.held
        for inode, data in files.items():
            if before_files.get(inode) != data:
                self.calls.append(Call("data", inode, data))
        for inode, entries in folders.items():
            was = before.get(inode, {})
            changed = {
                name: entries.get(name) for name in was.keys() | entries.keys() if was.get(name) != entries.get(name)
            }
            if len({i or was.get(name) for name, i in changed.items()}) == 1 and len(changed) == 2:
                self.calls.append(Call("entry", inode, changed))  # a rename is one call
            else:
                self.calls += [Call("entry", inode, {name: i}) for name, i in sorted(changed.items())]
        self.held = files, folders

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, syncs, renames and removals are noted, and what was written before each."""
        real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "rmdir", "unlink")}

        def sync(handle: int) -> None:
            self.note()
            self.calls.append(Call("sync", os.fstat(handle).st_ino))

        def noted(call: Callable) -> Callable:
            def done(*arguments: Any, **more: Any) -> Any:
                self.note()
                out = call(*arguments, **more)
                self.note()
                return out

            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            for name in ("replace", "mkdir", "rmdir", "unlink"):
                patch.setattr(os, name, noted(real[name]))
            yield
        self.note()

    def states(
        self, calls: int, most: int, draw: random.Random
    ) -> Iterator[tuple[dict[int, bytes], dict[int, dict[str, int]]]]:
        """What may be left after so many calls: all of it where that is at most `most`, else as many drawn."""
        files, folders = dict(self.begun[0]), {inode: dict(e) for inode, e in self.begun[1].items()}
        loose: list[Call] = []
        for call in self.calls[:calls]:
            if call.kind != "sync":
                loose = (
                    [c for c in loose if (c.kind, c.inode) != ("data", call.inode)] if call.kind == "data" else loose
                )
                loose.append(call)
                continue
            for kept in [c for c in loose if c.inode == call.inode]:
                loose.remove(kept)
                _apply(files, folders, kept, "whole")
        choices = [CUTS if c.kind == "data" else CUTS[::2] for c in loose]
        count = 1
        for c in choices:
            count *= len(c)
        every = (
            itertools.product(*choices) if count <= most else (tuple(map(draw.choice, choices)) for _ in range(most))
        )
        for chosen in every:
            now = dict(files), {inode: dict(e) for inode, e in folders.items()}
            for call, cut in zip(loose, chosen):
                _apply(*now, call, cut)
            yield now


def _apply(files: dict[int, bytes], folders: dict[int, dict[str, int]], call: Call, cut: str) -> None:
    if call.kind == "data":
        half = len(call.what) // 2
        left = {"nothing": files.get(call.inode, b""), "torn": call.what[:half] + bytes(half // 2), "whole": call.what}
        files[call.inode] = left[cut]
    elif cut == "whole":
        entries = folders.setdefault(call.inode, {})
        for name, inode in call.what.items():
            if inode is None:
                entries.pop(name, None)
            else:
                entries[name] = inode


def build(root: Path, home: int, files: dict[int, bytes], folders: dict[int, dict[str, int]]) -> None:
    """A state as a folder. An entry whose file was never written is an empty file, one of a folder an empty folder."""
    root.mkdir()
    for name, inode in folders.get(home, {}).items():
        if inode in folders or inode not in files:
            build(root / name, inode, files, folders)
        else:
            (root / name).write_bytes(files[inode])


def weights(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What is saved at a step."""
    draw = torch.Generator().manual_seed(step)
    return {
        f: {"w": torch.randn(64, generator=draw), "b": torch.randn(8, generator=draw)}
        for f in ("model", "ema-0", "optimizer")
    }


def save(stage: Path, step: int, keep: int = 2) -> None:
    """As a stage does."""
    checkpoint.save(stage, step, weights(step), {"stage": "pre", "nimg": step, "done": False}, keep=keep)


# name: the steps that are on disk, the one that is saved, how many are kept
SAVES = {
    "the third": ((1, 2), 3, 2),
    "the second": ((1,), 2, 2),
    "one that pushes out": ((1,), 2, 1),
    "once more": ((1, 2), 2, 2),
}


def loads(stage: Path, may: tuple[int, ...]) -> str:
    """What is wrong with what is loaded; empty where it is one of these steps, to the bit."""
    tensor_file._hashed.clear()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = checkpoint.latest(stage)
        if found is None or found.manifest["step"] not in may:
            return f"loads {found and found.manifest['step']}, not one of {may}"
        for name, tensors in weights(found.manifest["step"]).items():
            got = found.tensors(name)
            if got.keys() != tensors.keys() or not all(torch.equal(got[k], t) for k, t in tensors.items()):
                return f"loads {name} of step {found.manifest['step']} with other numbers"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run(arguments: argparse.Namespace) -> int:
    begun, rows, wrong = time.process_time(), [], list[str]()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="crashes-") as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # what a disk keeps is reckoned: no real one is waited for
        for name, (old, new, keep) in SAVES.items():
            stage = Path(home) / name.replace(" ", "-")
            for step in old:
                save(stage, step)
            disk = Disk(stage)
            with disk.watched():
                save(stage, new, keep)
            root, states = os.stat(stage).st_ino, 0
            (copy := Path(home) / "run" / "pre").parent.mkdir(exist_ok=True)
            share = max(1, arguments.n // len(SAVES) // (len(disk.calls) + 1))
            for calls in range(len(disk.calls) + 1):
                for files, folders in disk.states(calls, share, draw):
                    shutil.rmtree(copy, ignore_errors=True)
                    build(copy, root, files, folders)
                    states += 1
                    why = loads(copy, tuple({*old, new}))
                    if not why:
                        debris.clear(copy.parent)
                        save(copy, 9)
                        left = list((copy / "checkpoints").glob(".tmp-step-*"))
                        why = loads(copy, (9,)) or (f"leaves {left[0].name}" if left else "")
                    if why:
                        wrong.append(f"{name}, after call {calls} of {len(disk.calls)}: {why}")
            rows.append({"save": name, "calls": len(disk.calls), "states": states})
    cpu_s = time.process_time() - begun
    for line in wrong[:20]:
        print(line)
    for row in rows:
        print(f"{row['save']:>20}: {row['calls']} calls, {row['states']} states")
    total = sum(row["states"] for row in rows)
    print(f"{total} states, {len(wrong)} of them load neither the old nor the new checkpoint, {cpu_s:.1f} CPU seconds")
    results = about("cpu") | {"seed": arguments.seed, "states": total, "lost": len(wrong), "saves": rows}
    write_json(arguments.json, results | {"cpu_s": round(cpu_s, 1)})
    return int(bool(wrong))
