"""The few collective calls, each the identity on one process.

Ranks come from the environment, which torchrun and the deepspeed launcher set alike: RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT. A rank that is dead or hangs ends every other one's next collective call: at once where its
connection closed, else when the watchdog gives it up (watchdog.py), or the process group's timeout is over.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cmt_fast.runtime.watchdog import Watchdog

_timeout: timedelta | None = None  # of this process's group, once it has one
_side: dist.ProcessGroup | None = None
_met = 0  # calls of `meet` so far, the same on all ranks
_watchdog: Watchdog | None = None  # where there are several
T = TypeVar("T")
P = ParamSpec("P")


def start(device: torch.device, timeout_s: float = 1800.0) -> None:
    """Join the launcher's process group, if this process was started by one. timeout_s: of a collective call."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        global _timeout, _watchdog
        _timeout = timedelta(seconds=timeout_s)
        mine = _store_of_this_start(_timeout)
        dist.init_process_group(_backend(device), timeout=_timeout, **mine)
        _watchdog = Watchdog(dist.distributed_c10d._get_default_store(), rank(), size(), timeout_s)


def _store_of_this_start(timeout: timedelta) -> dict[str, Any]:
    """Of one machine's torchrun, whose store outlives ranks that it starts again: keys of this start alone, else they find the
    addresses and the cries of those that died. {} where the store is new each time, or for several machines, whose torchruns
    count their starts apart: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them a new one (docker/slurm/train.sbatch)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or local_size() != int(os.environ["WORLD_SIZE"]):
        return {}
    store, rank_, size_ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    start_ = f"cmt/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return {"store": dist.PrefixStore(start_, store), "rank": rank_, "world_size": size_}


def _watched(call: Callable[P, T]) -> Callable[P, T]:
    """The collective call, with the watchdog knowing that it waits."""

    @functools.wraps(call)
    def watched(*args: P.args, **more: P.kwargs) -> T:
        if _watchdog is None:
            return call(*args, **more)
        with _watchdog.waiting():
            return call(*args, **more)

    return watched


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, a library has ranks wait for each other, by a timeout of its own: they do as long as all of them live."""
    with _watchdog.waiting(limited=False) if _watchdog else contextlib.nullcontext():
        yield


def at_work(run: Path) -> None:
    """The run that ranks work on: its folder takes their stacks and the files of their hearts (watchdog.py)."""
    if _watchdog:
        _watchdog.place(run)


def beat(step: int) -> None:
    """This rank has done so many steps."""
    if _watchdog:
        _watchdog.beat(step)


def anyone(asked: list[int]) -> bool:
    """Whether this rank was asked to stop, or another that came by here was: no collective call, for ranks that are not in
    step. The next collective call is where they meet."""
    if size() == 1:
        return bool(asked)
    store = dist.distributed_c10d._get_default_store()
    if asked:
        store.set("cmt/asked", "1")
    return bool(asked) or store.check(["cmt/asked"])


def alone(device: torch.device) -> None:
    """A process group of this process alone, where there is none: some libraries do not go without."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)


def same_timeout(*groups: dist.ProcessGroup) -> None:
    """Give groups that a library made the timeout of the default one: they come with torch's, which may be longer."""
    timeout = _timeout
    if timeout is not None:
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def lost(error: BaseException) -> str | None:
    """One line where an error of a collective call means that another rank is dead or hangs, None for other errors."""
    text = " ".join(str(error).split())
    closed = any(
        mark in text
        for mark in (
            "Connection closed by peer",
            "Connection was likely closed",
            "Connection reset",
            "Connection refused",
            "Broken pipe",
            "remote process exited",
        )
    )
    late = any(mark in text.lower() for mark in ("timed out", "timeout"))
    if not (closed or late) or not (dist.is_initialized() or isinstance(error, dist.DistError)):
        return None
    what = (
        "another process died"
        if closed
        else "another process is dead or hangs: a collective call timed out (timeout_s)"
    )
    text = re.sub(r"^\[\S+\] *", "", text)  # a line of the library's source
    stacks = f"; {_watchdog.ask()}" if _watchdog and not closed else ""
    return f"{what}; what is on disk is sound ({text[:120]}){stacks}"


def side_group() -> dist.ProcessGroup | None:
    """A group of all ranks on the CPU for what a thread beside the training does, so that the two never wait for each other's
    calls: made once a process, by all ranks together; None on one process."""
    global _side
    if size() == 1:
        return None
    if _side is None:
        _side = dist.new_group(backend="gloo", timeout=_timeout)
    return _side


def stop() -> None:
    """Leave the process group."""
    global _side, _watchdog
    _side, ended, _watchdog = None, _watchdog, None
    if ended:
        ended.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Ranks on this machine; torchrun and the deepspeed launcher have a name each for it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


@_watched
def mean_(x: Tensor) -> Tensor:
    """x averaged over ranks, in place."""
    if size() > 1:
        dist.all_reduce(x)
        x /= size()
    return x


@_watched
def sum_(x: Tensor) -> Tensor:
    """x added up over ranks, on the device that x is on; in place where it can be."""
    if size() == 1:
        return x
    there = x.cuda() if dist.get_backend() == "nccl" else x.cpu()
    dist.all_reduce(there)
    return there.to(x.device)


@_watched
def gather_uneven(x: Tensor | None) -> Tensor:
    """Shards (n_r, F) of ranks joined in rank order, on the CPU; n_r may differ, and be None for no rows at all."""
    if size() == 1:
        assert x is not None
        return x
    rows, width = (0, 0) if x is None else x.shape
    most, width, double = largest(rows), largest(width), largest(int(x is not None and x.dtype == torch.float64))
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    mine = torch.zeros(most, width, dtype=torch.float64 if double else torch.float32, device=place)
    if x is not None:
        mine[:rows] = x
    counts = gather_rows(torch.tensor([rows], device=place)).tolist()
    every = torch.empty(size() * most, width, dtype=mine.dtype, device=place)
    dist.all_gather(list(every.chunk(size())), mine)  # into their places: of large features no other copy is made
    if min(counts) == most:
        return every.cpu()
    return torch.cat([part[:n] for part, n in zip(every.chunk(size()), counts)]).cpu()


@_watched
def largest(n: int) -> int:
    """The largest n of all ranks, the same on each."""
    if size() == 1:
        return n
    x = torch.tensor(n, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def smallest(n: int) -> int:
    """The smallest n of all ranks, the same on each."""
    return -largest(-n)


def every_rank(x: list[float]) -> list[list[float]]:
    """The numbers of every rank, in rank order, the same on each."""
    if size() == 1:
        return [x]
    mine = torch.tensor(x, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    return gather_rows(mine[None]).tolist()


@_watched
def gather_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Equal shards (n, ...) of all ranks joined along `dim`, in rank order."""
    if size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


@_watched
def tensor_of_first(x: Tensor) -> Tensor:
    """x (...) of the first rank, on all, where x is; every rank gives one of the same shape and type."""
    if size() == 1:
        return x
    there = x.cuda() if dist.get_backend() == "nccl" else x.cpu()
    dist.broadcast(there, 0)
    return there.to(x.device)


def text_of_first(text: str) -> str:
    """The first rank's text, on all."""
    return from_first(text.encode).decode()


@_watched
def share_rows(x: Tensor) -> None:
    """x: (n, ...), of which each rank has made its own of equal parts, in rank order: all have all of it. In place."""
    if size() > 1:
        parts = list(x.chunk(size()))
        dist.all_gather(parts, parts[rank()].clone())


WRITER = "the process that writes could not write"


def agreed(call: Callable[[], object], kind: type[Exception] = OSError, text: str = WRITER) -> None:
    """Call it on every rank; where one of them raises `kind`, all do, so that none waits for it: the others with `text`."""
    refused: Exception | None = None
    try:
        call()
    except kind as error:
        refused = error
    if largest(int(refused is not None)):
        raise refused or kind(text)


@_watched
def from_first(call: Callable[[], bytes], kind: type[Exception] = OSError) -> bytes:
    """What the first rank's `call` returns, on every rank: one reads, and the others are sent it.

    Where it raises `kind` there, all ranks raise it with the same text.
    """
    if size() == 1:
        return call()
    body, refused = b"", None
    if rank() == 0:
        try:
            body = call()
        except kind as error:
            body, refused = str(error).encode(), error
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    head = torch.tensor([int(refused is not None), len(body)], device=place)
    dist.broadcast(head, 0)
    failed, length = head.tolist()
    sent = torch.empty(length, dtype=torch.uint8, device=place)
    if rank() == 0 and body:
        sent.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    if length:
        dist.broadcast(sent, 0)
    body = sent.cpu().numpy().tobytes()
    if failed:
        raise refused or kind(body.decode())
    return body


def meet(call: Callable[[], T], kind: type[Exception] = OSError, every_s: float = 0.2) -> T:
    """Call it on every rank, each as long as it takes; return when all have. Where one raises `kind`, all do, with its text;
    of another error it alone raises that one.

    Ranks wait by the launcher's store and not by a collective call, whose timeout would have to be that of the slowest
    disk: copying a store to the disk of each machine may take an hour on one of them.
    """
    if size() == 1:
        return call()
    global _met
    _met += 1
    store, key, refused, result = dist.distributed_c10d._get_default_store(), f"cmt/meet/{_met}", None, None
    try:
        result = call()
    except kind as error:
        refused = error
        store.set(f"{key}/refused", str(error))
    except BaseException as error:  # the others know of no timeout: they would wait for this rank for ever
        store.set(f"{key}/refused", f"{type(error).__name__}: {error}")
        store.add(f"{key}/here", 1)
        store.add(f"{key}/seen", 1)
        raise
    store.add(f"{key}/here", 1)
    with _watchdog.waiting(limited=False) if _watchdog else contextlib.nullcontext():  # of a dead rank it knows
        while store.add(f"{key}/here", 0) < size():
            time.sleep(every_s)
        text = store.get(f"{key}/refused").decode() if store.check([f"{key}/refused"]) else None
        store.add(f"{key}/seen", 1)
        while rank() == 0 and store.add(f"{key}/seen", 0) < size():  # the store may be this process's, and ends with it
            time.sleep(every_s / 10)
    if text is not None:
        raise refused or kind(text)
    return result  # type: ignore[return-value]  # nothing was refused, so there is one


LATE_S = 90.0  # by which what a rank sees of a folder may be old: NFS keeps a listing for up to 60


def all_see(there: Callable[[], bool], late_s: float | None = None) -> None:
    """Return when `there` holds on all ranks, as a file of the first one does late on another machine; after LATE_S as it is."""

    def wait() -> None:
        end = time.monotonic() + (LATE_S if late_s is None else late_s)
        while not there() and time.monotonic() < end:
            time.sleep(0.2)

    if size() > 1:
        meet(wait, every_s=0.05)


@_watched
def barrier() -> None:
    if size() > 1:  # NCCL warns on every rank where it has to guess the device
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
