"""Reading what a run's folder holds without believing it: the one door for its small files.

Whatever a crash, a disk or a hand left in the place of a file, reading it ends, and ends with what was written or with one
declared error: a pipe or a device is not waited for, a folder or a link is refused, a file that is too long is not read, and
JSON that is none, nests too deep, is no object, or does not match the checksum in it is `Unsound`. So is what says that it is of
another stage than the one in whose folder it lies. Files of versions that wrote no checksum, or no stage, are read as they are.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from cmt_fast.config.errors import one_line

STAGES = ("pre", "mid", "post", "control")  # the folders of a run's stages: what lies in one is of that stage alone
SUM = "xxh3_128"  # the key under which JSON carries the checksum of the rest
MOST = 64 << 20  # bytes of a small file


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind: one line that says which and why, whatever its files are called."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class Unsound(CheckpointError):
    """A file of a run's folder is not what was written there: one line that names it and says why."""

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


def handle(path: Path, flags: int = os.O_RDONLY) -> int:
    """A regular file, opened; a link, a folder, a pipe or a device is refused at once.

    Raises FileNotFoundError where nothing is there, Unsound for what is no file, OSError as the system gives it.
    """
    try:
        found = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        what = _kind(path)
        if what:
            raise Unsound(path, f"is {what}, not a file") from None
        raise
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise Unsound(path, f"is {_kind(path) or 'something else'}, not a file")
    return found


def data(path: Path, most: int = MOST) -> bytes:
    """All bytes of a small file. Raises FileNotFoundError where nothing is there, else Unsound."""
    try:
        with open(handle(path), "rb") as file:
            long = os.fstat(file.fileno()).st_size > most
            found = b"" if long else file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(2, os.strerror(2), str(path)) from None
    except OSError as error:
        raise Unsound(path, f"cannot be read ({error.strerror})") from None
    if long:
        raise Unsound(path, f"has more than the {most:,} bytes that such a file has")
    return found


def read(path: Path, most: int = MOST, signs: bool = False, key: str = SUM) -> dict[str, Any]:
    """An object of JSON, without its checksum, which stands under `key`. signs: it always had one, and is not believed without.

    Raises FileNotFoundError where nothing is there, else Unsound.
    """
    try:
        found = json.loads(data(path, most).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unsound):
            raise
        raise Unsound(path, f"cannot be read ({_line(error)})") from None
    if not isinstance(found, dict):
        raise Unsound(path, "cannot be read (it holds no object of JSON)")
    want = found.pop(key, None)
    if (want != digest(found)) if (signs or want is not None) else _renamed(found):
        raise Unsound(path, "was changed after it was written")
    placed(path, found)
    return found


def _renamed(found: Mapping[str, Any]) -> bool:
    """Whether what has no checksum has one under another name: then a bit of that name fell over."""
    named = [k for k, v in found.items() if isinstance(v, str) and len(v) == 32]
    return any(found[name] == digest({k: v for k, v in found.items() if k != name}) for name in named)


def stage_of(folder: Path) -> str:
    """The stage whose folder this is; empty for another folder."""
    return folder.name if folder.name in STAGES else ""


def placed(path: Path, found: Mapping[str, Any], folder: Path | None = None) -> None:
    """Raises Unsound where what a file says is of another stage than the one in whose folder (None: the file's) it lies."""
    here = stage_of(folder or path.parent)
    if here and found.get("stage", here) != here:
        raise Unsound(path, f"is of stage {found['stage']}, not of {here}: it was copied from there")


def signed(body: Mapping[str, Any], key: str = SUM) -> str:
    """The text of a file for `read`: the body with its checksum."""
    plain = {k: v for k, v in json.loads(json.dumps(body)).items() if k != key}
    return json.dumps({**plain, key: digest(plain)}, indent=1)


def digest(body: Mapping[str, Any]) -> str:
    """The checksum of JSON, however it is laid out."""
    return xxhash.xxh3_128_hexdigest(canonical(dict(body)))


def canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def aside(path: Path, why: str) -> Path:
    """Give what is damaged a name that nobody reads, and say so on stderr. Returns where it is: there still where nothing may
    be renamed."""
    for n in range(1, 1000):
        place = path.with_name(f"{path.name}.damaged{f'-{n}' if n > 1 else ''}")
        if not os.path.lexists(place):
            break
    try:
        os.replace(path, place)
    except OSError:
        place = path
    print(f"{path}: {why}; {f'put aside as {place.name}' if place != path else 'passed over'}", file=sys.stderr)
    return place


def _kind(path: Path) -> str:
    """What stands in the place of a file, with its article; empty for a file, and for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return ""
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return "" if stat.S_ISREG(mode) else next((name for of, name in kinds if of(mode)), "a device")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
