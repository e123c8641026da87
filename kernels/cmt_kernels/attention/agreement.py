"""One decision on all ranks: each says what it chose, and the latest choice in the common list holds.

Through the store of the process group, not by a collective: a decision may fall in a backward beside the collectives of
an engine, or on one rank alone (an evaluation), and a collective would then hang or be answered by another. A rank that
hears nothing of the others for WAIT_S goes on with its own choice, which is right there, and says so.
"""

import time
import warnings
from collections.abc import Callable

import torch.distributed as dist

WAIT_S = 120.0  # longer than others may take to compile what they choose among
POLL_S = 0.005


def agree(question: str, first: int, next_from: Callable[[int], int]) -> int:
    """The least choice that no rank rejects. first: this rank's; next_from(i): its first from i on that it accepts.

    Every rank must ask the same questions, each once and in any order. Choices end somewhere that all accept.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return first
    mine, turn = first, 0
    while True:
        heard = _exchange(f"cmt_attention/{question}/{turn}", mine)
        if heard is None:
            warnings.warn(
                f"{question}: not all ranks answered in {WAIT_S:.0f} s; rank {dist.get_rank()} goes on alone",
                stacklevel=2,
            )
            return mine
        if min(heard) == max(heard):
            return mine
        mine, turn = next_from(max(heard)), turn + 1


def _exchange(key: str, mine: int) -> list[int] | None:
    """What every rank answered under this key; None if one did not in time."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"{key}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], str(mine))
    end = time.monotonic() + WAIT_S
    while not store.check(keys):
        if time.monotonic() > end:
            return None
        time.sleep(POLL_S)
    return [int(store.get(k)) for k in keys]
