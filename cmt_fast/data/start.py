"""How many processes open one store: a single rank reads its small files, and a single process of a machine copies its rows.

Labels, checksums and the index of ImageNet are some 20 MB, which 64 ranks would ask the shared disk for at once. Inside
`together` the first rank reads each of them once and sends it to the others. Rows are read by every rank all through
training. Where CMT_STORE_CACHE names a folder on a disk of the machine, they are copied there first:

    CMT_STORE_CACHE/NAME-DIGEST/         a store like any other, whole; DIGEST is of its index
    CMT_STORE_CACHE/NAME-DIGEST.part/    one that is being copied: files that have their name are whole and checked
    CMT_STORE_CACHE/NAME-DIGEST.busy/    held by the process that copies (storage/locks.py)

The lock ends with its process, so whoever waits goes on with the copy of one that was killed, whatever the launcher, and two
jobs on a machine share one copy. Each row is checked against its checksum when it has been copied, and again
whenever it is read. The copy is made by training alone; `cmt train --dry-run` says what it would be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cmt_fast.data.archives import DatasetError
from cmt_fast.data.latents import CHECKSUMS, INDEX, LABELS, Read, Store, small
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import files, locks

VARIABLE = "CMT_STORE_CACHE"
BLOCK = 16 << 20  # bytes copied at a time
POLL_S = 0.2  # between looks of one who waits for the copy of another
MB = 1_000_000


class Together(NamedTuple):
    """What holds inside `together`: whether stores are copied, and the small files that were read so far."""

    copy: bool
    files: dict[Path, bytes]

    def read(self, path: Path, most: int, absent: str) -> bytes:
        """As latents.Read, by one rank for all, once."""
        if path not in self.files:
            self.files[path] = distributed.from_first(lambda: small(path, most, absent), DatasetError)
        return self.files[path]


_inside: Together | None = None


@contextlib.contextmanager
def together(copy: bool) -> Iterator[None]:
    """Inside, all ranks open the same stores in the same order. copy: onto the disk that CMT_STORE_CACHE names, if it does."""
    global _inside
    _inside = Together(copy, {})
    try:
        yield
    finally:
        _inside = None


def reader() -> Read:
    """How the small files of a store are read here: by one rank for all inside `together`, else by each for itself."""
    return _inside.read if _inside else small


def nearby(store: Store, reopen: Callable[[Path], Store]) -> Store:
    """The store, or its copy on this machine's own disk. reopen: opens the same rows in another folder.

    Raises DatasetError, on all ranks, where the folder that CMT_STORE_CACHE names is none, is full or cannot be written, and
    where a row that was copied is not the one that was encoded.
    """
    if not _inside:
        return store
    _ = store.facts  # all ranks are here; a later one that asks alone would wait for the others
    store.read_alone()
    place = os.environ.get(VARIABLE, "")
    if not distributed.largest(int(bool(place))):
        return store
    if not _inside.copy:
        if place and distributed.rank() == 0:
            total = sum(_sizes(store).values())
            progress.say(
                f"{VARIABLE}: training copies {total / 1e9:,.3f} GB of {store.folder} to {place} on each machine"
            )
        return store
    # a machine on which nothing is named reads the store itself, and waits for the others
    folder = distributed.meet(lambda: copied(store, Path(place)) if place else store.folder, DatasetError)
    if not place:
        return store
    # the copy's small files are the store's, byte for byte, and have been read
    _inside.files.update({folder / path.name: b for path, b in _inside.files.items() if path.parent == store.folder})
    near = reopen(folder)
    near.facts = store.facts
    near.read_alone()
    return near


def copied(store: Store, place: Path) -> Path:
    """The folder below `place` that has the store's copy; makes it, or waits for the process that does."""
    if not place.is_dir():
        raise DatasetError(
            f"{VARIABLE}: {str(place)!r} is not a folder; make it on a disk of each machine, or unset it"
        )
    target = place / _name(store)
    sizes = _sizes(store)
    if _whole(target, sizes):  # who may not write here, as another user, may read it
        return target
    try:
        with _locked(target, sum(sizes.values())):
            if not _whole(target, sizes):
                _copy(store, target, sizes)
    except OSError as error:
        raise _refused(place, error) from None
    return target


def _name(store: Store) -> str:
    """Of its copy: another version of the store has another."""
    return f"{store.folder.resolve().name}-{str(store.facts['xxh3_128'])[:16]}"


def _sizes(store: Store) -> dict[str, int]:
    """Files of a store and their bytes: the index comes last. Those that only tools of others read come along."""
    names = [s.file for s in store.index.shards]
    more = [n for s in names if (store.folder / (n := str(Path(s).with_suffix(".idx")))).is_file()]
    names += [*more, CHECKSUMS, *[LABELS] * bool(store.index.classes), INDEX]
    try:
        return {name: (store.folder / name).stat().st_size for name in names}
    except OSError as error:
        raise DatasetError(f"{store.folder}: {error.strerror}: {error.filename}") from None


def _whole(folder: Path, sizes: dict[str, int]) -> bool:
    return all(_size(folder / name) == size for name, size in sizes.items())


def _size(path: Path) -> int:
    """Of a file, in bytes; -1 where there is none, or no more: who waits looks while another one renames."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1


def _bytes_in(part: Path) -> int:
    """Of all files of a copy that another process is making, as far as they can be seen."""
    found = 0
    with contextlib.suppress(FileNotFoundError):  # a folder went between two looks
        for path in part.glob("**/*"):
            found += max(0, _size(path))
    return found


@contextlib.contextmanager
def _locked(target: Path, total: int) -> Iterator[None]:
    """Inside, no other process of this machine copies the store; until then, how far the other one is."""
    place = target.with_name(f"{target.name}.busy")
    with contextlib.ExitStack() as ending:
        if not _taken(place, ending):
            part, seen = target.with_name(f"{target.name}.part"), 0
            with progress.phase("another process copies the store to this machine, MB", total // MB) as tell:
                while not _taken(place, ending):
                    time.sleep(POLL_S)
                    now = _bytes_in(part) // MB
                    tell(max(0, now - seen))
                    seen = max(seen, now)
        yield


def _taken(place: Path, ending: contextlib.ExitStack) -> bool:
    """Whether this process has it now, up to the end of what is given."""
    place.mkdir(exist_ok=True)
    with contextlib.ExitStack() as mine:
        mine.callback(_gone, place)
        try:
            mine.enter_context(locks.holding(place, remove=True))
        except locks.Taken:
            mine.pop_all()
            return False
        except FileNotFoundError:  # who had it took it away
            return False
        ending.push(mine.pop_all())
    return True


def _gone(place: Path) -> None:
    with contextlib.suppress(OSError):
        place.rmdir()


def _copy(store: Store, target: Path, sizes: dict[str, int]) -> None:
    """Copy what is not there yet. Raises DatasetError for a full disk, before and while, and for damaged rows."""
    part = target.with_name(f"{target.name}.part")
    if target.is_dir():
        os.replace(target, part) if not part.exists() else shutil.rmtree(target)
    under_way = part / "copying"
    shutil.rmtree(under_way, ignore_errors=True)  # of one that was killed
    under_way.mkdir(parents=True)
    left = {name: size for name, size in sizes.items() if _size(part / name) != size}
    free = files.free(part)
    if free is not None and sum(left.values()) > free:
        raise _full(target.parent, free, sum(left.values()), store)
    shards = {s.file: k for k, s in enumerate(store.index.shards)}
    with progress.phase("copying the store to this machine, MB", sum(sizes.values()) // MB) as tell:
        done = sum(sizes.values()) - sum(left.values())
        tell(done // MB)
        for name in left:
            for block in _blocks(store.folder / name, under_way / name):
                done += block
                tell(done // MB - (done - block) // MB)
            _check(store, shards.get(name), under_way, name)
            os.replace(under_way / name, part / name)
    under_way.rmdir()
    files.sync(part)
    os.replace(part, target)
    files.sync(target.parent)


def _blocks(source: Path, target: Path) -> Iterator[int]:
    """Copy a file, synced; yields the bytes of each block that is written."""
    with open(source, "rb") as have, open(target, "wb") as out:
        while block := have.read(BLOCK):
            out.write(block)
            yield len(block)
        out.flush()
        os.fsync(out.fileno())


def _check(store: Store, shard: int | None, folder: Path, name: str) -> None:
    """Raises DatasetError where a file that was copied does not hold what the store's checksums say."""
    if shard is not None:
        bad = store.damaged(shard, folder)
    else:
        wanted = store.index.files.get(name) if name in (CHECKSUMS, LABELS) else None
        wanted = str(store.facts["xxh3_128"]) if name == INDEX else wanted
        bad = [name] if wanted and files.checksum(folder / name) != wanted else []
    if bad:
        raise DatasetError(
            f"{VARIABLE}: {store.folder / name} came as another to {folder.parent.parent}, {len(bad)} checksum"
            f"{'s' * (len(bad) > 1)} differ{'s' * (len(bad) == 1)}; `cmt data verify {store.folder}` says whether it is damaged"
        )


def _full(place: Path, free: int, wanted: int, store: Store) -> DatasetError:
    others = [p for p in place.iterdir() if p.is_dir() and not p.name.startswith(_name(store))]
    kept = f"; {len(others)} other folders are in it" if others else ""
    return DatasetError(
        f"{VARIABLE}: {str(place)!r} has {free / 1e9:,.3f} GB free, and the copy of {store.folder} takes {wanted / 1e9:,.3f} GB "
        f"more{kept}; free some, name another disk, or unset it"
    )


def _refused(place: Path, error: OSError) -> DatasetError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "is full" if full else f"cannot be used ({error.strerror})"
    kept = "; what was copied is kept, and the next start goes on with it" if full else ""
    return DatasetError(f"{VARIABLE}: {str(place)!r} {what}{kept}")
