"""Arrays too large for memory as one .npz: written block by block beside it, moved into it one after the other at the end.

A block is an .npy file of some rows, under its name only when it is whole: what a kill leaves behind has a temporary name
and never counts. Joining reads a few rows at a time, so the memory is small whatever the number of rows, and takes each block
away when its rows are safe in the archive to be, so the disk holds the rows once and not twice. Killed in the middle, the same
call goes on where it was: a file beside the archive to be says how many rows that has, and their checksum.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cmt_fast.storage import files

AT_ONCE = 1 << 24  # bytes copied at a time
SAFE = 1 << 30  # bytes that are moved before the disk is waited for and their blocks go
JOINED, RECORD = ".joined", "joined.json"


@contextlib.contextmanager
def block(path: Path, rows: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Inside: put(place, part) writes part (m, ...) as the block's rows place to place + m; at the end the block is there.

    Where an exception leaves it, nothing is. All parts have one dtype and one shape of a row.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    form: tuple[Any, ...] = ()

    try:
        with open(
            temporary, "wb"
        ) as file:  # not a map of the file: on a full disk a map ends the process without a word

            def put(place: int, part: np.ndarray) -> None:
                nonlocal form
                if not form:
                    header = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, *part.shape[1:])})
                    form = file.tell(), part.dtype, part.shape[1:]
                assert form[1:] == (part.dtype, part.shape[1:]), "parts of a block differ"
                file.seek(form[0] + place * part[:1].nbytes)
                file.write(part.tobytes())

            yield put
            assert form, "a block of no rows"
        files.sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Joined(NamedTuple):
    """What of an archive to be is safe: its first `rows` of `of`, each of `shape` and `dtype`, behind `start` bytes; the CRC-32
    of the array's header and these rows.
    """

    rows: int
    of: int
    shape: tuple[int, ...]
    dtype: str
    start: int
    crc: int

    @property
    def end(self) -> int:
        """Bytes of the file up to there."""
        return self.start + self.rows * int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def joined(folder: Path, rows: Sequence[int]) -> Joined | None:
    """How far blocks of so many rows each were joined in this folder; None where no call of `join` has come to that.

    Where blocks were cut otherwise before, as the last one of fewer samples, what ends within one of these is not counted.
    """
    try:
        found = json.loads((folder / RECORD).read_text("utf-8"))
        state = Joined(**{**found, "shape": tuple(found["shape"])})
        whole = (folder / JOINED).stat().st_size >= state.end
    except (OSError, ValueError, KeyError, TypeError):
        return None
    last = max((end for end in itertools.accumulate(rows) if end <= state.rows), default=0)
    return (state if last == state.rows else state._replace(rows=last, of=0)) if whole and last else None


def join(
    blocks: Sequence[tuple[Path, int]], out: Path, name: str, small: dict[str, np.ndarray], comment: bytes = b"",
    advance: Callable[[int], object] = lambda rows: None,
) -> int:  # fmt: skip
    """Move the rows of blocks (file, rows), all of one folder, in their order into an .npz, as `name`, with small arrays beside
    it. Returns the number of rows.

    Blocks that an earlier call moved, as `joined` says, need not be there. comment: that of the zip, at most 65,535 bytes.
    advance is told of rows. The file is whole or not there, and the same rows are the same bytes whenever it is written. Raises
    OSError where it cannot be written.
    """
    folder, n = blocks[0][0].parent, sum(rows for _, rows in blocks)
    state = joined(folder, [rows for _, rows in blocks])
    if state is None:
        first = np.load(blocks[0][0], mmap_mode="r")
        state = Joined(0, n, tuple(first.shape[1:]), first.dtype.str, 0, 0)
    header = _header(state, n)
    member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # without a date zipfile would put in the hour
    member.external_attr, member.CRC, member.header_offset = 0o600 << 16, 0, 0
    start = len(member.FileHeader(zip64=True)) + len(header)
    with open(folder / JOINED, "r+b" if state.rows else "w+b") as file:
        if state.rows and (state.of, state.start) != (n, start):
            crc = zlib.crc32(header)
            file.seek(state.start)
            for part in _parts(file, state.end - state.start):
                crc = zlib.crc32(part, crc)
            state = state._replace(of=n, crc=crc)
            assert state.start == start, "headers differ in length"
        elif not state.rows:
            state = state._replace(start=start, crc=zlib.crc32(header))
        file.truncate(state.end)
        advance(state.rows)
        state = _moved(file, blocks, state, advance)
        member.CRC, member.file_size = state.crc, state.end - start + len(header)
        member.compress_size = member.file_size
        file.seek(0)
        file.write(member.FileHeader(zip64=True) + header)
        file.seek(state.end)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # which begins where the file is
            archive.comment = comment
            archive.filelist.append(member)
            archive.NameToInfo[member.filename] = member
            for key, array in small.items():
                with archive.open(zipfile.ZipInfo(f"{key}.npy", member.date_time), "w", force_zip64=True) as inner:
                    np.lib.format.write_array(inner, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / JOINED, out)
    return n


def _moved(
    file: BinaryIO, blocks: Sequence[tuple[Path, int]], state: Joined, advance: Callable[[int], object]
) -> Joined:
    """The file with all rows in it; blocks go when the disk has theirs."""
    at, gone, file_start = 0, list[Path](), state.end
    file.seek(state.end)
    for path, rows in blocks:
        at += rows
        if at <= state.rows:
            path.unlink(missing_ok=True)  # a kill came between the record and this
            continue
        assert at - rows == state.rows, "blocks were cut otherwise"
        with open(path, "rb") as block_:
            np.lib.format.read_magic(block_)
            np.lib.format.read_array_header_1_0(block_)
            crc = state.crc
            for part in _parts(block_, state._replace(rows=rows).end - state.start):
                crc = zlib.crc32(part, crc)
                file.write(part)
        state = state._replace(rows=at, crc=crc)
        gone.append(path)
        advance(rows)
        if state.end - file_start >= SAFE:
            _record(file, gone, state)
            gone, file_start = [], state.end
    _record(file, gone, state)
    return state


def _record(file: BinaryIO, gone: list[Path], state: Joined) -> None:
    file.flush()
    os.fsync(file.fileno())
    if gone:
        files.write_text(gone[0].with_name(RECORD), json.dumps(state._asdict()))
    for path in gone:
        path.unlink()


def _header(state: Joined, n: int) -> bytes:
    out = io.BytesIO()
    header = {"descr": state.dtype, "fortran_order": False, "shape": (n, *state.shape)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """So many bytes of a file, a few at a time. Raises OSError where it ends before."""
    while size:
        part = file.read(min(size, AT_ONCE))
        if not part:
            raise OSError("a block of samples ends too early")
        size -= len(part)
        yield part
