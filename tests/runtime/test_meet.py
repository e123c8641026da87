"""Ranks that wait for each other by the launcher's store."""

from __future__ import annotations

import contextlib
import threading
import types

import pytest
import torch.distributed as dist

from cmt_fast.runtime import distributed


def test_who_meets_a_rank_that_failed_otherwise_is_told(monkeypatch):
    """They know of no timeout: an error of any kind has to reach them."""
    store, said = dist.HashStore(), {}
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: int(threading.current_thread().name))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "_met", 0)

    def fails() -> None:
        raise MemoryError("no room")

    def meets(call) -> None:
        distributed._met = 0  # each process has its own
        try:
            distributed.meet(call, every_s=0.01)
        except BaseException as error:
            said[distributed.rank()] = error

    threads = [threading.Thread(target=meets, args=(call,), name=str(rank)) for rank, call in enumerate((int, fails))]
    for thread in threads:
        thread.start()
        thread.join(0.2 if thread is threads[0] else 10)
    threads[0].join(10)
    assert isinstance(said[1], MemoryError)
    with pytest.raises(OSError, match="MemoryError: no room"):
        raise said[0]


def test_a_rank_that_dies_before_it_has_read_what_was_said_is_waited_for_under_the_watchdog(monkeypatch):
    """The first rank keeps the store for the others: one that was killed right there held it for ever."""
    store, watched = dist.HashStore(), []

    @contextlib.contextmanager
    def waiting(limited):
        watched.append(limited)
        yield
        watched.pop()

    def sleep(s):
        raise InterruptedError(f"{watched}")

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "_met", 0)
    monkeypatch.setattr(distributed, "_watchdog", types.SimpleNamespace(waiting=waiting))
    monkeypatch.setattr(distributed, "time", types.SimpleNamespace(sleep=sleep))
    store.add("cmt/meet/1/here", 1)  # of the other, which is gone then
    with pytest.raises(InterruptedError, match=r"\[False\]"):
        distributed.meet(lambda: None)
