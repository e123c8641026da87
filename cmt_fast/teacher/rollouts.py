"""Rollouts into a buffer that stays where it is: the whole of one is a CUDA graph on a GPU, and a call elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import Table, rollout
from cmt_fast.runtime import signals
from cmt_fast.runtime.cuda_graphs import aside, captured, reason


class Buffer(NamedTuple):
    """Trajectories: nodes (N + 1, n, ...), labels (n,) | None, guidance scale and interval (n, 3), None where they have none."""

    nodes: Tensor
    labels: Tensor | None = None
    guide: Tensor | None = None

    def of(self, rows: slice, copy: bool = False) -> Buffer:
        """These trajectories."""
        parts = (self.nodes[:, rows], *(None if a is None else a[rows] for a in self[1:]))
        return Buffer(*(a.clone() if copy and a is not None else a for a in parts))  # type: ignore[arg-type]


class Rolling:
    """Integrates what stands in nodes[0] (n, ...), under labels and guidance, into nodes (N + 1, n, ...), in place.

    At most `batch` rows go at once. On a GPU one rollout is captured once and replayed: of the buffer itself where all
    rows go at once, else of a window that rows are copied through, whose last turn may hold rows of the turn before.
    Every rollout is a replay, the first too, so a run that is taken up again makes the same bits. What cannot be captured
    is called, and one line says so. What a rollout allocates stays with its graph: `batch` bounds it.
    """

    def __init__(
        self,
        teacher: Net,
        path: ProbabilityPath,
        plan: Table,
        buffer: Buffer,
        batch: int,
        *,
        computing: Callable[[], AbstractContextManager] = nullcontext,
        graph: bool = True,
        tell: Callable[[str], None] = print,
    ) -> None:
        """computing: what a rollout is run in, as an autocast; graph: whether one can be captured."""
        self.teacher, self.path, self.plan, self.computing, self.tell = teacher, path, plan, computing, tell
        self.buffer = buffer
        self.batch = min(batch, buffer.nodes.shape[1])
        self.graph = graph and buffer.nodes.is_cuda
        self._replay: Callable[[], None] | None = None
        self._window = buffer

    def __call__(self) -> None:
        """Roll out all rows."""
        if self.graph and self._replay is None:
            self._capture()
        for part in torch.arange(self.buffer.nodes.shape[1]).split(self.batch):
            signals.look()  # all ranks have as many parts
            rows = slice(int(part[0]), int(part[-1]) + 1)
            self._turn(rows) if self._replay else self._roll(self.buffer.of(rows))

    def _roll(self, of: Buffer) -> None:
        with self.computing():
            rollout(self.teacher, self.path, self.plan, of.nodes[0], of.labels, nodes=of.nodes, guide=of.guide)

    def _capture(self) -> None:
        if self.batch < self.buffer.nodes.shape[1]:
            self._window = self.buffer.of(slice(self.batch), copy=True)
        try:
            aside(lambda: self._roll(self._window), self.buffer.nodes.device)
            self._replay = captured(lambda: self._roll(self._window))
        except RuntimeError as error:
            self.graph, self._window = False, self.buffer
            self.tell(f"the teacher's rollouts are called one network after the other, no CUDA graph: {reason(error)}")

    def _turn(self, rows: slice) -> None:
        """One replay, through the window where it is not the buffer."""
        assert self._replay is not None
        if self._window is self.buffer:
            return self._replay()
        mine, window = self.buffer.of(rows), self._window.of(slice(rows.stop - rows.start))
        window.nodes[0] = mine.nodes[0]
        for here, there in zip(window[1:], mine[1:]):
            if here is not None:
                here.copy_(there)
        self._replay()
        mine.nodes.copy_(window.nodes)
