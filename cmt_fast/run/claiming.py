"""Who may write samples where: one command at a time, and none over what is there already.

A finished .npz says in the comment of its zip what drew it, as the samples.json of a folder does; numpy passes it over.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import files, locks

LATER = ("sampler",)  # what samples did not say before
WORDS = 60_000  # bytes of a zip's comment, which may have 65,535


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other command writes into this folder, which is there (storage/locks.py).

    Raises ConfigError where another one does; what the system refuses inside as OSError that names the folder.
    """
    with contextlib.ExitStack() as ending:

        def lock() -> None:
            if distributed.rank() or (folder.exists() and not folder.is_dir()):
                return
            folder.mkdir(exist_ok=True)
            try:
                ending.enter_context(locks.holding(folder, remove=True, tell=progress.say))
            except locks.Taken as taken:
                raise ConfigError(f"--out: {folder} is being written by {taken.by}") from None

        try:
            distributed.agreed(lock, ConfigError, "the folder of the samples is being written by another process")
            yield
        except OSError as error:
            if error.errno is None:
                raise
            text = f"{error.strerror}; what is there counts, rerun the same command to go on"
            raise OSError(error.errno, text, str(folder)) from None


def differing(stored: dict[str, Any], about: dict[str, Any], what: Path) -> None:
    """Raises ConfigError where stored samples are not those that `about` would draw. Those of before may not say LATER."""
    known = {k: v for k, v in about.items() if k in stored or k not in LATER}
    differs = [f"{k}: {stored.get(k)}, not {v}" for k, v in known.items() if stored.get(k) != v]
    if differs:
        raise ConfigError(f"--out: {what} holds other samples ({'; '.join(differs[:3])}); choose another name")


def comment(about: dict[str, Any], n: int) -> bytes:
    """What an .npz of n samples says of itself; many classes by their checksum."""
    text = json.dumps({**about, "n": n})
    if len(text) > WORDS:
        many = xxhash.xxh3_128_hexdigest(json.dumps(about["classes"]).encode())
        text = json.dumps({**about, "classes": many, "n": n})
    return text.encode()


def no_file(out: Path) -> None:
    """Raises ConfigError for a pipe, a device, or a link that leads nowhere in the place of OUT, which is not opened."""
    if files.no_place(out) or (out.is_symlink() and not out.exists()):
        raise ConfigError(f"--out: {out} is there and is no file and no folder; choose another name")


def finished(out: Path, about: dict[str, Any], n: int) -> bool:
    """Whether these n samples are in an .npz already. Raises ConfigError where other things are in its place."""
    if not out.exists():
        return False
    try:
        with zipfile.ZipFile(out) as archive:
            stored = json.loads(archive.comment)
    except Exception:  # zipfile and json raise nearly every kind for a file of others
        stored = None
    if not isinstance(stored, dict):
        raise ConfigError(f"--out: {out} is there and does not say what drew it; choose another name")
    differing(stored, json.loads(comment(about, n)), out)
    return True
