"""One safetensors file, tensor by tensor in one pass over its bytes, which are hashed on the way: written, and read.

Who reads a file in its own order reads it once: the checksum is known when the last tensor has come, and one that is wrong is
raised then, as `Damaged`. What was asked for in another order is hashed to its end first. A file that this process has hashed
is not hashed again while it stays the same file, by path, inode, size and times of its last change, from before it was read
to the verdict.
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import xxhash

from cmt_fast.storage import sound
from cmt_fast.storage.sound import CheckpointError as CheckpointError
from cmt_fast.storage.sound import Unsound

if TYPE_CHECKING:  # torch comes with the first tensor: who lists runs reads manifests alone
    from torch import Tensor

BLOCK = 1 << 22  # bytes that are read, and hashed while they are in the processor's cache
RACY_NS = 2_000_000_000  # a file changed so lately may change again within one tick of its clock: it is not remembered
HEADER_BYTES = 100_000_000  # the longest header that the library reads
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

_late_ns = 0  # more, where a file system's clock is coarse or late
_hashed: dict[tuple[Any, ...], str] = {}  # identity of a file -> checksum of its bytes
read_bytes = 0  # of all files, by this process, for who measures a start


class Damaged(Unsound):
    """The bytes of a file cannot be had as its manifest vouches for them. It is remembered: nobody reads that file again."""


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by name, of known shapes, each fetched when it is asked for: nobody holds all of them. fp32 where they are
    to be written.

    Iterates in the order in which they are to be fetched: that of their file, or sorted. Where tensors are sharded or read by
    one of several ranks, a fetch is a collective call, so every rank fetches all, in one order.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        fetch: Callable[[str], Tensor],
        rest: Callable[[], None] | None = None,
    ) -> None:
        """rest: reads what nobody asked for, to its file's end."""
        self.shapes, self.fetch, self.rest = dict(shapes), fetch, rest

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # a mapping's own way would fetch it

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def check(self) -> None:
        """Raises Damaged where the file that they come from is, in a collective call where a fetch is one."""
        if self.rest:
            self.rest()


class Written(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    xxh3_128: str


class Span(NamedTuple):
    """Where a tensor is in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def identity(path: Path) -> tuple[Any, ...] | None:
    """What makes a file the same file to this process; None where it is not there."""
    try:
        known = os.stat(path)
    except OSError:
        return None
    # the second time cannot be set: it tells of a change that kept the first, as a copy does
    return os.path.abspath(path), known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns


def remember(path: Path, digest: str, was: tuple[Any, ...] | None) -> None:
    """The checksum of a file's bytes. was: its identity before they were read; nothing is remembered of a file that is another
    one by now, or that changed so lately that it may change unseen."""
    key = identity(path)
    if key and key == was and time.time_ns() - max(key[4:]) > RACY_NS + _late_ns:
        _hashed[key] = digest


def racy(late_ns: int) -> None:
    """How much longer than RACY_NS a file must have stayed the same to be remembered: by how much the times of a file system
    are coarse, or late."""
    global _late_ns
    _late_ns = max(0, late_ns)


def remembered(path: Path) -> str | None:
    """The checksum of a file's bytes, if this process has read them."""
    key = identity(path)
    return _hashed.get(key) if key else None


def condemn(path: Path, was: tuple[Any, ...] | None = None) -> None:
    """Remember a file as damaged, on ranks too that have not read it, however lately it changed. was: its identity before it
    was read, if this process has: one that took its place meanwhile is another file."""
    key = identity(path)
    if key and was in (None, key):
        _hashed[key] = "damaged"


def checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes, hashed once a process while the file stays the same. Raises OSError, and Unsound for what is
    no file."""
    known = remembered(path)
    if known is not None:
        return known
    was = identity(path)
    handle = sound.handle(path)
    try:
        state, at, block = xxhash.xxh3_128(), 0, bytearray(BLOCK)
        while got := _read(handle, memoryview(block), at):
            state.update(memoryview(block)[:got])
            at += got
    finally:
        os.close(handle)
    remember(path, state.hexdigest(), was)
    return state.hexdigest()


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[Tensor]) -> Written:
    """A file of fp32 tensors, one after the other, sorted by name: the bytes that the library writes. Raises OSError."""
    header, end = {}, 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    state, total = xxhash.xxh3_128(head), len(head)
    try:
        with open(path, "wb") as file:
            file.write(head)
            for name in sorted(shapes):
                tensor = next(tensors).detach()
                tensor = (tensor.cpu() if tensor.is_cuda else tensor).float().contiguous()
                assert tuple(tensor.shape) == tuple(shapes[name]), name
                data = memoryview(cast(Any, tensor.reshape(-1).numpy())).cast("B")
                for start in range(0, len(data), BLOCK):
                    block = data[start : start + BLOCK]
                    file.write(block)
                    state.update(block)
                total += len(data)
    except OSError as error:
        error.filename = error.filename or str(path)  # what refuses a write does not name its file
        raise
    return Written(total, state.hexdigest())


class Reader:
    """A file whose size and checksum are known, read in one pass by who asks for its tensors in its order.

    Raises Damaged where size, header or checksum are not as they should be, and where the system does not read it.
    """

    def __init__(self, path: Path, want: Mapping[str, Any]) -> None:
        """want: {"bytes", "xxh3_128"}, as the manifest has them."""
        self.path, self.want, self._next, self._state = path, want, 0, xxhash.xxh3_128()
        self._was = identity(path)
        try:
            self._file = sound.handle(path)
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror})") from None
        except Unsound as error:
            raise self._damaged(error.why) from None
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_size != want["bytes"]:
            raise self._damaged(f"is missing or has not the {want['bytes']} bytes of the manifest")
        known = remembered(path)
        if known not in (None, want["xxh3_128"]):
            raise self._damaged("does not match its checksum")
        self.sound = known is not None
        try:
            self.spans = self._header()
        except Damaged:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged("does not match its checksum") from None
        self.order = list(self.spans)
        if not self.order:
            self.rest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, in the order of the file."""
        return {name: span.shape for name, span in self.spans.items()}

    def fetch(self, name: str) -> Tensor:
        """A tensor of its own memory. Raises Damaged at the last one of a pass, or before one that is out of order."""
        if not self.sound and self.order[self._next : self._next + 1] != [name]:
            self.rest()
        out = self._tensor(self.spans[name])
        if not self.sound:
            self._next += 1
            if self._next == len(self.order):
                self._judge()
        return out

    def rest(self) -> None:
        """Hash what has not been read."""
        if self.sound:
            return
        block = memoryview(bytearray(BLOCK))
        for name in self.order[self._next :]:
            span = self.spans[name]
            for start in range(span.start, span.end, BLOCK):
                self._fill(block[: min(BLOCK, span.end - start)], start, True)
        self._next = len(self.order)
        self._judge()

    def _header(self) -> dict[str, Span]:
        """Where tensors are, in their order, without a gap to the end of the file. Raises ValueError and what JSON does."""
        head = memoryview(bytearray(8))
        self._fill(head, 0, not self.sound)
        length = int.from_bytes(head, "little")
        if length > min(self.want["bytes"] - 8, HEADER_BYTES):
            raise ValueError(length)
        text = memoryview(bytearray(length))
        self._fill(text, 8, not self.sound)
        found = json.loads(bytes(text))
        found.pop("__metadata__", None)
        spans, at = {}, 8 + length
        for name, about in sorted(found.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
            start, end = (8 + length + int(n) for n in about["data_offsets"])
            span = Span(DTYPES[about["dtype"]], tuple(map(int, about["shape"])), start, end)
            if (
                start != at
                or end - start != math.prod(span.shape) * _itemsize(span.dtype)
                or min(span.shape, default=0) < 0
            ):
                raise ValueError(name)
            spans[name], at = span, end
        if at != self.want["bytes"]:
            raise ValueError(at)
        return spans

    def _tensor(self, span: Span) -> Tensor:
        import torch

        raw = torch.empty(span.end - span.start, dtype=torch.uint8)
        data = memoryview(cast(Any, raw.numpy()))
        for start in range(0, len(data), BLOCK):
            self._fill(data[start : start + BLOCK], span.start + start, not self.sound)
        return raw.view(getattr(torch, span.dtype)).view(span.shape)

    def _fill(self, block: memoryview, at: int, hashed: bool) -> None:
        done = 0
        while done < len(block):
            try:
                got = _read(self._file, block[done:], at + done)
            except OSError as error:
                raise self._damaged(f"cannot be read ({error.strerror})") from None
            if not got:
                raise self._damaged("was cut while it was read")
            done += got
        if hashed:
            self._state.update(block)

    def _judge(self) -> None:
        """The verdict at the end of the pass."""
        found = self._state.hexdigest()
        if found != self.want["xxh3_128"]:
            raise self._damaged("does not match its checksum")
        remember(self.path, found, self._was)
        self.sound = True

    def _damaged(self, why: str) -> Damaged:
        condemn(self.path, self._was)
        return Damaged(self.path, why)


def _itemsize(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


def _read(handle: int, into: memoryview, at: int) -> int:
    global read_bytes
    got = os.preadv(handle, [into], at)
    read_bytes += got
    return got
