"""An engine's state as it was at one step, in host memory: what a checkpoint is written from while steps go on.

Each rank copies the partitions that it holds, and nothing else; the copy is all that a step waits for. Whoever writes asks for
tensors by name: the ranks then send their parts to the first over a process group of their own, one tensor at a time, so that
nobody holds a whole copy that it did not hold before, and no collective call of the training is disturbed.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cmt_fast.runtime import distributed
from cmt_fast.storage.tensor_file import Tensors

PIECE = 1 << 26  # elements of a piece of pinned memory, 256 MiB: torch keeps such memory in powers of two
_pinned = _most_pinned = 0  # bytes of such memory in copies that this process has, and the most that it ever had


class Place(NamedTuple):
    """Where a rank's part of a tensor is: from `start` on in a partition; elements first to last of the flat tensor."""

    partition: int
    start: int
    first: int
    last: int


class Host:
    """A flat tensor's copy in host memory; of a GPU's in pinned pieces, which torch keeps for the next one."""

    def __init__(self, flat: Tensor) -> None:
        self.pieces = []
        for part in flat.detach().split(PIECE):
            piece = torch.empty(part.shape, dtype=torch.float32, pin_memory=flat.is_cuda)
            self.pieces.append(piece.copy_(part, non_blocking=True))
        if flat.is_cuda:
            _count(4 * flat.numel())
            weakref.finalize(self, _count, -4 * flat.numel())

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start to stop."""
        out = []
        while start < stop:
            piece, at = divmod(start, PIECE)
            end = min(stop - piece * PIECE, PIECE)
            out.append(self.pieces[piece][at:end])
            start += end - at
        return out[0] if len(out) == 1 else torch.cat(out) if out else torch.empty(0)


def _count(pinned: int) -> None:
    global _pinned, _most_pinned
    _pinned += pinned
    _most_pinned = max(_pinned, _most_pinned)


def kept_bytes() -> int:
    """Of pinned memory that earlier copies had: torch keeps it for the next, and the system knows of no free memory there."""
    return _most_pinned - _pinned


class Snapshot:
    """A state on its way to a checkpoint. Made on every rank at the same step, read on every rank in the same order."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], places: dict[str, Place], held: Mapping[str, Sequence[Tensor]],
        constants: Mapping[str, Tensor], files: Collection[str] | None, added: bool,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """shapes: of the parameters; places: of this rank's parts; held: this rank's partitions of p, m, v and each track.

        files: those that are wanted, None for all. added: parts of several ranks are summed where the same are gathered by
        `state`, so that a negative zero is written as it writes it. extra: small tensors that are kept beside the moments.
        """
        self.names = ["model", *(k for k in held if k.startswith("ema-")), "optimizer"]
        self.names = [name for name in self.names if files is None or name in files]
        keys = {key for name in self.names for key in _keys(name)}
        self.shapes, self.places = dict(shapes), places
        self.added = added and distributed.size() > 1
        self.copies = {key: [Host(flat) for flat in flats] for key, flats in held.items() if key in keys}
        self.extra = {name: x.detach().cpu().clone() for name, x in (extra or {}).items()}
        self.constants = {name: x.detach().cpu().clone() for name, x in constants.items()}
        if any(flat.is_cuda for flats in held.values() for flat in flats):
            torch.cuda.synchronize()
        self._owners: list[dict[str, Place]] | None = None

    def state(self, group: dist.ProcessGroup | None) -> dict[str, Tensors]:
        """File name -> full tensors by name, whole on the first rank and empty on the others: a collective call of `group`,
        as is each fetch."""
        if distributed.size() == 1:
            self._owners = [self.places]
        else:
            self._owners = [{} for _ in range(distributed.size())]
            dist.all_gather_object(self._owners, self.places, group=group)
        out = {}
        for file in self.names:
            if file == "optimizer":
                shapes = {f"{key}.{name}": shape for key in "mv" for name, shape in self.shapes.items()}
                shapes |= {name: tuple(x.shape) for name, x in self.extra.items()}
            else:
                shapes = self.shapes | {name: tuple(x.shape) for name, x in self.constants.items()}
            fetch = functools.partial(self._fetch, file, group)
            out[file] = Tensors({name: shapes[name] for name in sorted(shapes)}, fetch)
        return out

    def _fetch(self, file: str, group: dist.ProcessGroup | None, name: str) -> Tensor:
        if file == "optimizer" and name in self.extra:
            return self.extra[name]
        if file == "optimizer":
            return self._full(name[2:], name[0], group)
        return self.constants[name] if name in self.constants else self._full(name, _keys(file)[0], group)

    def _full(self, name: str, key: str, group: dist.ProcessGroup | None) -> Tensor:
        """A tensor of which every rank has sent its part to the first."""
        mine, first = self.places.get(name), distributed.rank() == 0
        if not first:
            if mine:
                dist.send(self._part(mine, key).contiguous(), 0, group=group)
            return torch.empty(0)
        assert self._owners is not None
        shape = self.shapes[name]
        count = math.prod(shape)
        if mine and mine.last - mine.first == count:
            full = self._part(mine, key)
        else:
            full = torch.zeros(count)
            for rank, places in enumerate(self._owners):
                place = places.get(name)
                if place and rank:
                    dist.recv(full[place.first : place.last], rank, group=group)
                elif place:
                    full[place.first : place.last] = self._part(place, key)
        return (full + 0.0 if self.added else full).view(shape)

    def _part(self, place: Place, key: str) -> Tensor:
        return self.copies[key][place.partition].read(place.start, place.start + place.last - place.first)


def _keys(file: str) -> tuple[str, ...]:
    """What a file is made of: p, m, v, or a track of its own name."""
    return {"model": ("p",), "optimizer": ("m", "v")}.get(file, (file,))
