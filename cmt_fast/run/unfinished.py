"""What an evaluation has done so far, on disk until it ends: a command that was killed goes on, and ends with the same figures.

RUN/judging/NAME-KEY/about.json                     what the samples are of; another key is another folder
RUN/judging/NAME-KEY/K-000000000-000000064.block    what was taken of samples 0 to 63 in K steps (evaluation/tallies.py)
RUN/judging/NAME-KEY/figures.json                   the figures that have ended, by steps and number of samples

A block appears by rename and begins with a checksum of the rest: what was cut off does not count. It holds features, not
samples: 8 to 12 kB a sample for FID, 0.5 GB of 50,000, and goes when the figures of its number of steps are there; the
folder goes when the command has said them. The lock of the folder is one command's at a time: a second one that judges the
same keeps nothing. Where nothing can be written, or the disk is full, nothing is kept, and the figures are the same.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmt_fast.evaluation.ledgers import Ledger
from cmt_fast.evaluation.measures import Seen
from cmt_fast.run.folder import JUDGING
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import files, locks, sound

ABOUT, FIGURES = "about.json", "figures.json"
WORD = 32  # of a block, before its tensors: their checksum


class Unfinished:
    """Blocks and figures of samples of one key. folder None: keeps nothing, and has nothing."""

    def __init__(self, folder: Path | None = None, figures: dict[str, dict[str, Any]] | None = None) -> None:
        self.folder, self._figures = folder, figures or {}

    def ledger(self, name: str) -> Ledger:
        """The figures of one set of samples."""
        return Ledger(self.folder / FIGURES if self.folder else None, name, self._figures)

    def block(self, name: str, index: Tensor) -> Seen | None:
        """What was taken of samples `index`, which follow each other; None where that is not here, whole."""
        try:
            data = sound.data(self._file(name, index), 1 << 34) if self.folder else b""
            if not data or xxhash.xxh3_128(data[WORD:]).hexdigest().encode() != data[:WORD]:
                return None
            return Seen(**{key: tensor.clone() for key, tensor in load(data[WORD:]).items()})
        except (OSError, sound.Unsound, SafetensorError, TypeError):
            return None

    def put(self, name: str, seen: Seen) -> None:
        """Keep it."""
        if self.folder is None:
            return
        data = save({k: v.detach().cpu().contiguous() for k, v in seen._asdict().items() if v is not None})
        try:
            files.write_bytes(self._file(name, seen.index), xxhash.xxh3_128(data).hexdigest().encode() + data)
        except OSError:
            self.folder = None  # what is there stays for the next time

    def drop(self, name: str) -> None:
        """The blocks of this name are needed no more; after all ranks have read them."""
        if self.folder is not None:
            for file in self.folder.glob(f"{name}-*.block"):
                file.unlink(missing_ok=True)

    def _file(self, name: str, index: Tensor) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{int(index[0]):09d}-{int(index[-1]) + 1:09d}.block"


@contextlib.contextmanager
def opened(run: Path, name: str, key: dict[str, Any]) -> Iterator[Unfinished]:
    """Inside: what is kept of an evaluation of this key; left without an error it is gone, else it waits for the next command.

    run: the folder of the run, which may be missing; every rank must call it. What other weights of the same name left goes.
    """
    text = json.dumps(key, sort_keys=True, indent=1)
    digest = xxhash.xxh3_64(text.encode()).hexdigest()
    folder, handle = run / JUDGING / f"{name}-{digest}", None
    if distributed.rank() == 0:
        handle = _claimed(run, folder, text)
    try:
        if distributed.largest(int(handle is not None)) == 0:
            yield Unfinished()
            return
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)  # where ranks share no file system, each keeps its own
        yield Unfinished(folder, Ledger.read(folder / FIGURES))
        distributed.barrier()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    finally:
        if handle is not None:
            handle.close(remove=True)


def _claimed(run: Path, folder: Path, about: str) -> locks.Held | None:
    """The lock of the folder, which then is there and says what it is of; None where another has it, or nothing is written."""
    handle = None
    if not run.is_dir():
        return None
    try:
        _clear(folder, about)
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder)
        if handle is not None:
            for left in folder.glob(".tmp-*"):
                left.unlink(missing_ok=True)
            files.write_bytes(folder / ABOUT, about.encode())
    except OSError:
        if handle is not None:
            handle.close()
        return None
    return handle


def _locked(folder: Path) -> locks.Held | None:
    try:
        return locks.take(folder, progress.say)
    except locks.Taken:
        return None


def _clear(folder: Path, about: str) -> None:
    """Take away what can never go on: folders of the same name whose weights are no more, unless another command has them."""
    mine = json.loads(about).get("weights")
    for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if other == folder or sound.read(other / ABOUT).get("weights") == mine:
                continue
            handle = _locked(other)
            if handle is not None:
                shutil.rmtree(other, ignore_errors=True)
                handle.close()
