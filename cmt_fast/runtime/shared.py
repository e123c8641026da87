"""A checkpoint's file read and hashed by one rank, its tensors broadcast to the others: bytes that leave the disk once.

Whatever the reader finds is everybody's: the others get zeros in the place of what it could not read, all fetch to the end, and
then all raise the same error, so no rank waits for another and all fall back alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmt_fast.runtime import distributed
from cmt_fast.storage import tensor_file
from cmt_fast.storage.checkpoint import Checkpoint
from cmt_fast.storage.tensor_file import CheckpointError, Damaged, Tensors


def stream(found: Checkpoint, name: str) -> Tensors:
    """As `found.stream(name)`; on several ranks every one makes this call, and fetches every tensor in the same order.

    Raises CheckpointError on all ranks, as Damaged where the file is.
    """
    if distributed.size() == 1:
        return found.stream(name)
    return _Broadcast(found, name).tensors


class _Broadcast:
    """One file on its way from the first rank to all."""

    def __init__(self, found: Checkpoint, name: str) -> None:
        self.path = found.folder / f"{name}.safetensors"
        self.error: CheckpointError | None = None
        self.source: Tensors | None = None
        head: dict[str, Any] = {}
        if distributed.rank() == 0:
            try:
                self.source = found.stream(name)
                head = self.source.shapes
            except CheckpointError as error:
                self.error = error
        self._agree()
        shapes = _told(head)
        self.left = set(shapes)
        self.place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        self.tensors = Tensors(shapes, self.fetch, self.rest)

    def fetch(self, name: str) -> Tensor:
        out = torch.zeros(self.tensors.shapes[name], device=self.place)
        if self.source is not None:
            try:
                out.copy_(self.source[name])
            except CheckpointError as error:
                self.error = self.error or error
        dist.broadcast(out, 0)
        if self.left:
            self.left.discard(name)
            if not self.left:
                self._agree()
        return out

    def rest(self) -> None:
        if self.source is not None and self.error is None:
            try:
                self.source.check()
            except CheckpointError as error:
                self.error = error
        self._agree()

    def _agree(self) -> None:
        """Raise on all ranks what the first has found."""
        error = self.error
        damaged = isinstance(error, Damaged)
        wrong = _told((damaged, error.why if isinstance(error, Damaged) else str(error)) if error else None)
        if wrong is None:
            return
        damaged, why = wrong
        if damaged:
            tensor_file.condemn(self.path)
        raise Damaged(self.path, why) if damaged else CheckpointError(why)


def _told(x: Any) -> Any:
    """What the first rank says, on every rank."""
    box = [x]
    dist.broadcast_object_list(box, 0, device=torch.device("cuda") if dist.get_backend() == "nccl" else None)
    return box[0]
