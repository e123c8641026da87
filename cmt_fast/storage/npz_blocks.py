"""Arrays too large for memory as one .npz: written block by block beside it, joined by a stream at the end.

A block is an .npy file of some rows, under its name only when it is whole: what a kill leaves behind has a temporary name
and never counts. Joining reads a few rows at a time, so the memory is that of one block whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmt_fast.storage import files

AT_ONCE = 1 << 24  # bytes copied at a time


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


def join(
    blocks: Sequence[Path], out: Path, name: str, small: dict[str, np.ndarray], comment: bytes = b"",
    advance: Callable[[int], object] = lambda rows: None,
) -> int:  # fmt: skip
    """Write an .npz of the blocks' rows in their order, as `name`, and of small arrays beside it. Returns the number of rows.

    comment: that of the zip, at most 65,535 bytes. advance is told of rows.

    The file is whole or not there, and the same rows are the same bytes whenever it is written. Raises OSError where it
    cannot be written.
    """
    opened = lambda path: np.load(path, mmap_mode="r")  # one at a time: a map holds a file open
    first, n = opened(blocks[0]), sum(len(opened(path)) for path in blocks)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = comment
            with archive.open(_member(name), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (n, *first.shape[1:])})
                for part in map(opened, blocks):
                    step = max(1, AT_ONCE // max(1, part[:1].nbytes))
                    for i in range(0, len(part), step):
                        file.write(part[i : i + step].tobytes())
                        advance(min(step, len(part) - i))
            for key, array in small.items():
                with archive.open(_member(key), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        files.sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return n


def _member(name: str) -> zipfile.ZipInfo:
    """An array of the archive; without a date of its own zipfile would put in the hour."""
    return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
