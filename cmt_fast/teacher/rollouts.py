"""Rollouts into a buffer that stays where it is: the whole of one is a CUDA graph on a GPU, and a call elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import Table, rollout
from cmt_fast.runtime import signals
from cmt_fast.runtime.cuda_graphs import aside, captured, reason


class Rolling:
    """Integrates what stands in nodes[0] (n, ...), under labels (n,) | None, into nodes (N + 1, n, ...), in place.

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
        buffer: tuple[Tensor, Tensor | None],
        batch: int,
        *,
        computing: Callable[[], AbstractContextManager] = nullcontext,
        graph: bool = True,
        tell: Callable[[str], None] = print,
    ) -> None:
        """buffer: nodes and labels; computing: what a rollout is run in, as an autocast; graph: whether one can be captured."""
        self.teacher, self.path, self.plan, self.computing, self.tell = teacher, path, plan, computing, tell
        self.nodes, self.labels = buffer
        self.batch = min(batch, self.nodes.shape[1])
        self.graph = graph and self.nodes.is_cuda
        self._replay: Callable[[], None] | None = None
        self._window = buffer

    def __call__(self) -> None:
        """Roll out all rows."""
        if self.graph and self._replay is None:
            self._capture()
        for part in torch.arange(self.nodes.shape[1]).split(self.batch):
            signals.look()  # all ranks have as many parts
            rows = slice(int(part[0]), int(part[-1]) + 1)
            self._turn(rows) if self._replay else self._roll(self.nodes[:, rows], _of(self.labels, rows))

    def _roll(self, nodes: Tensor, labels: Tensor | None) -> None:
        with self.computing():
            rollout(self.teacher, self.path, self.plan, nodes[0], labels, nodes=nodes)

    def _capture(self) -> None:
        if self.batch < self.nodes.shape[1]:
            self._window = self.nodes[:, : self.batch].clone(), _of(self.labels, slice(self.batch), copy=True)
        try:
            aside(lambda: self._roll(*self._window), self.nodes.device)
            self._replay = captured(lambda: self._roll(*self._window))
        except RuntimeError as error:
            self.graph, self._window = False, (self.nodes, self.labels)
            self.tell(f"the teacher's rollouts are called one network after the other, no CUDA graph: {reason(error)}")

    def _turn(self, rows: slice) -> None:
        """One replay, through the window where it is not the buffer."""
        assert self._replay is not None
        nodes, labels = self._window
        if nodes is self.nodes:
            return self._replay()
        n = rows.stop - rows.start
        nodes[0, :n] = self.nodes[0, rows]
        if labels is not None and self.labels is not None:
            labels[:n] = self.labels[rows]
        self._replay()
        self.nodes[:, rows] = nodes[:, :n]


def _of(labels: Tensor | None, rows: slice, copy: bool = False) -> Tensor | None:
    return None if labels is None else labels[rows].clone() if copy else labels[rows]
