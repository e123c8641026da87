"""One process in a folder at a time, on any file system: by flock, or by a lease where flock is refused.

    FOLDER/.lock     what flock locks; the system frees it when its process is dead
    FOLDER/.lease    who holds the folder where flock is refused: host, pid, and a counter that goes up every BEAT_S

A lease is made by O_EXCL, which NFS, Lustre, CIFS and FUSE all have. Neither clocks nor file times are believed: who finds a
lease looks at its counter, and takes over one that stood still for STALE_S, or whose process is dead by the word of this very
machine. Of several who find it stale one takes it over: who made the file that is named after the old lease. A holder whose
lease was taken over, as after a machine was suspended, finds that out before its next checkpoint (`check`) and writes none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmt_fast.storage import sound

NAMES = LOCK, LEASE = ".lock", ".lease"
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
BEAT_S, STALE_S = 5.0, 60.0
DEAD = "ZXx"  # states of a process that runs no more
WIDTH = 12  # digits of the counter: a lease is written over in place, and needs no room for it

_held: list[Held] = []  # leases of this process


class Taken(Exception):
    """Another process holds the folder. by: who, as far as it says."""

    def __init__(self, folder: Path, by: str) -> None:
        super().__init__(f"{folder} is in use by {by}")
        self.by = by


class Held:
    """A folder that this process holds. kind: "flock" or "lease"."""

    def __init__(self, folder: Path, handle: int | None, about: dict[str, Any] | None = None) -> None:
        self.folder, self.kind, self._handle, self._about = (
            folder.absolute(),
            "lease" if about else "flock",
            handle,
            about,
        )
        self._ended, self._beats = threading.Event(), 0
        if about:
            _held.append(self)
            threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises OSError where another process has taken the folder over, also one that has ended since: nobody else takes
        a lease away."""
        if self._about and not self._ended.is_set() and not self._mine(found := _read(self.folder / LEASE) or b""):
            text = f"taken over by {_who(found)}, to whom this process was dead"
            raise OSError(errno.ESTALE, text, str(self.folder))

    def close(self, remove: bool = False) -> None:
        """Let go. remove: the file of a flock too, which otherwise stays."""
        self._ended.set()
        if self in _held:
            _held.remove(self)
        with contextlib.suppress(OSError):
            if self._about and self._mine(_read(self.folder / LEASE) or b""):
                os.unlink(self.folder / LEASE)
            elif self._handle is not None and remove:
                os.unlink(self.folder / LOCK)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _mine(self, found: bytes) -> bool:
        return self._about is not None and _parsed(found).get("token") == self._about["token"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                handle = _opened(self.folder / LEASE, os.O_RDWR)
                try:
                    if self._mine(os.read(handle, 4096)):
                        self._beats += 1
                        os.pwrite(handle, f"{self._beats:0{WIDTH}}".encode(), 0)
                        os.fsync(handle)
                finally:
                    os.close(handle)


def take(folder: Path, tell: Callable[[str], object] | None = None) -> Held:
    """Hold a folder, which is there. Raises Taken where another process holds it, OSError where nothing can be written.

    tell: is given a line where a lease is looked at, which takes up to STALE_S.
    """
    handle = _flocked(folder)
    if handle is None:
        about = _leased(folder, tell)
        _sweep(folder)
        return Held(folder, None, about)
    found = _read(folder / LEASE)  # of another machine, which is refused flock
    if found is not None:
        try:
            _await(folder, found, tell)
        except Taken:
            os.close(handle)
            raise
        with contextlib.suppress(OSError):
            os.unlink(folder / LEASE)
        _sweep(folder)
    with contextlib.suppress(OSError):  # for who is refused; nothing depends on it
        os.ftruncate(handle, 0)
        os.pwrite(handle, (_body(_me())).encode(), 0)
    return Held(folder, handle)


@contextlib.contextmanager
def holding(folder: Path, remove: bool = False, tell: Callable[[str], object] | None = None) -> Iterator[Held]:
    """`take` for as long as the block is under way."""
    held = take(folder, tell)
    try:
        yield held
    finally:
        held.close(remove)


def check(path: Path) -> None:
    """Raises OSError where a folder above `path` that this process holds by a lease was taken over."""
    for held in list(_held):
        if held.folder in (path.absolute(), *path.absolute().parents):
            held.check()


def flocks(handle: int) -> bool:
    """Lock an open file for this process, if its file system does that. Raises BlockingIOError where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            raise BlockingIOError(*error.args) from None
        return False
    return True


def _flocked(folder: Path) -> int | None:
    """A handle of the locked file, None where the file system refuses flock."""
    file = folder / LOCK
    while True:
        handle = _opened(file, os.O_RDWR | os.O_CREAT)
        try:
            if not flocks(handle):
                os.close(handle)
                return None
        except BlockingIOError:
            by = _who(os.pread(handle, 4096, 0))
            os.close(handle)
            raise Taken(folder, by) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)  # who had it took the file away


def _opened(file: Path, flags: int) -> int:
    """A handle of a file, and of no pipe, which would be waited for without end. Raises OSError."""
    try:
        return sound.handle(file, flags)
    except sound.Unsound as error:
        raise OSError(errno.EINVAL, f"{file.name} {error.why}", str(file)) from None


def _leased(folder: Path, tell: Callable[[str], object] | None) -> dict[str, Any]:
    """Make the lease, or take a stale one over. Returns what it says."""
    file, me = folder / LEASE, _me()
    while True:
        try:
            _make(file, me)
            return me
        except FileExistsError:
            pass
        found = _read(file)
        if found is None:
            continue
        last = _await(folder, found, tell)
        claim = file.with_name(f"{LEASE}-{_parsed(last).get('token', 'unread')}")
        try:
            _make(claim, me)
        except FileExistsError:  # another one is at it, or died at it
            _await(folder, _read(claim) or b"", tell, claim)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(claim)
            continue
        try:
            if _read(file) == last:  # else another one was faster
                _write(temporary := file.with_name(f"{LEASE}-{me['token']}.tmp"), me)
                os.unlink(file)  # and no rename over it, which is refused here and there; the claim keeps others off
                os.rename(temporary, file)
                return me
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(claim)


def _sweep(folder: Path) -> None:
    """What was left by those that died as they took a lease over: for who holds the folder. Who is still at it finds the
    lease changed, and leaves it."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{LEASE}-*"):
            left.unlink(missing_ok=True)


def _await(folder: Path, found: bytes, tell: Callable[[str], object] | None, file: Path | None = None) -> bytes:
    """Return the lease once its process is known to be dead. Raises Taken as soon as it shows life."""
    file, about = file or folder / LEASE, _parsed(found)
    alive = _alive(about)
    if alive:
        raise Taken(folder, _who(found))
    if alive is None:
        if tell:
            tell(f"{folder} has a lease of {_who(found)}: it is taken over if it is quiet for {STALE_S:.0f} s")
        end = time.monotonic() + STALE_S
        while time.monotonic() < end:
            time.sleep(min(BEAT_S, STALE_S) / 5)
            now = _read(file)
            if now is None:
                break
            if now != found:
                raise Taken(folder, _who(now))
    return found


def _alive(about: dict[str, Any]) -> bool | None:
    """Whether a process of this machine is alive; None for one of another machine or container, and for one that is not seen
    here, as another user's where /proc hides those."""
    me = _me()
    if any(about.get(key) != me[key] for key in ("host", "boot", "space")) or not me["started"]:
        return None
    found = _started(about.get("pid"))
    if found is None:
        return None if _hides(about.get("pid")) else False
    return found == about.get("started")


def _hides(pid: Any) -> bool:
    """Whether there is a process of which /proc says nothing."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    except OSError:
        return True
    return False


def _me() -> dict[str, Any]:
    """Who this process is: its machine since when it runs, its space of pids, and when it was started."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": boot,
        "space": space,
    }
    return {**me, "token": secrets.token_hex(8)}


def _started(pid: Any) -> str | None:
    """When a process began, in ticks since the machine did; None where there is none, or one that is dead and that nobody has
    waited for, as in a container without an init."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if state in DEAD else rest[18]
    except (OSError, ValueError, TypeError, OverflowError, IndexError):
        return None


def _body(about: dict[str, Any]) -> str:
    return f"{0:0{WIDTH}} {json.dumps(about)}\n"


def _make(file: Path, about: dict[str, Any]) -> None:
    """Raises FileExistsError."""
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        _write(file, about)
    except OSError:
        os.unlink(file)
        raise


def _write(file: Path, about: dict[str, Any]) -> None:
    handle = os.open(file, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        data = _body(about).encode()
        if os.write(handle, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(file: Path) -> bytes | None:
    try:
        with open(_opened(file, os.O_RDONLY), "rb") as opened:
            return opened.read(4096)
    except FileNotFoundError:
        return None


def _parsed(found: bytes) -> dict[str, Any]:
    try:
        about = json.loads(found[WIDTH:])
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _who(found: bytes) -> str:
    about = _parsed(found)
    if not about:
        return "another process"
    return f"another process (pid {about.get('pid')} on {str(about.get('host'))[:80]!r})"
