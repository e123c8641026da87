"""CUDA graphs: a call whose kernels are recorded once and launched again as a whole.

A replay reads and writes the very memory that the call used while it was recorded, so whoever captures a call keeps what
goes in and what comes out where it is. What the host decides during the recording is decided for every replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

REASON = 200  # letters of a refusal that one line has room for


@functools.cache
def _side(index: int) -> torch.cuda.Stream:
    """One side stream a device: torch keeps a workspace of cuBLAS for every stream that has multiplied, for ever."""
    return torch.cuda.Stream(index)


def aside(call: Callable[[], None], device: torch.device | str = "cuda") -> None:
    """`call` on a side stream, as what is to be captured runs once before: it compiles kernels, copies coefficients,
    chooses algorithms. Where `device` is no GPU it is called."""
    if torch.device(device).type != "cuda":
        return call()
    torch.cuda.empty_cache()  # a stream has memory of its own
    side = _side(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `call`, which has run before: its replay, which keeps the graph's memory as long as it lives.

    Nothing is computed here, and nothing that is not in use stays reserved: what eager calls left would stand beside the
    graph's own memory. Raises RuntimeError where it cannot be captured.
    """
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may pin memory meanwhile
        call()
    return graph.replay


def reason(error: BaseException) -> str:
    """Why a capture failed, in one line: the end of a recording that has failed raises an error of its own over the first."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0][:REASON]
