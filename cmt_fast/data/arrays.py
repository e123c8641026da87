"""Arrays of an .npz that anybody may have written: the one door for such files.

`np.load` takes the header's word for how much memory an array needs, calls what is no array bytes, and lets zipfile and the
tokenizer raise what they like. Here an array's header must promise exactly the bytes of its member, which cannot be more than
deflate makes of those in the file, and everything else is one error. Text is read, objects are not.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from cmt_fast.config.errors import one_line

DEFLATE = 1100  # bytes that a byte of a deflated member may become, and a little
HEADER_BYTES = 12_000  # the longest header that is read, and what is before it


class NoArrays(ValueError):
    """The file is no sound .npz, or an array in it is none: a few words, without the file's name."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text, 200))


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, also where zipfile stumbles over it."""
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # an archive that says it has several parts, for one
        return False


def read(path: Path, most: Mapping[str, int] | Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, those of `most` that are there: with how many bytes each may have, where it says so.

    Raises FileNotFoundError, and NoArrays for what is no such file, for objects, for other bytes than a header promises.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        raise NoArrays("it is no file")
    limits = dict(most) if isinstance(most, Mapping) else dict.fromkeys(most, 1 << 62)
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name: _member(archive, name, cap) for name, cap in limits.items()}
    except NoArrays:
        raise
    except MemoryError:
        raise NoArrays("its arrays do not fit into memory") from None
    except Exception as error:  # zipfile, zlib and NumPy raise nearly every kind for a damaged file
        raise NoArrays(str(error) or type(error).__name__) from None
    return {name: array for name, array in found.items() if array is not None}


def _member(archive: zipfile.ZipFile, name: str, cap: int) -> np.ndarray | None:
    """An array of the archive, None if it is not there."""
    known = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if not known:
        return None
    info = known[0]
    if len(known) > 1 or info.file_size > cap + HEADER_BYTES:
        raise NoArrays(f"{name} is there twice or has {info.file_size} bytes, at most {cap} are read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NoArrays(f"{name} is neither stored nor deflated")
    if info.file_size > DEFLATE * info.compress_size + 64:
        raise NoArrays(f"{name} says {info.file_size} bytes, and {info.compress_size} in the file cannot hold them")
    with archive.open(info) as file:
        promised, start, dtype = _promised(file, name)
    if promised + start != info.file_size:
        raise NoArrays(f"{name} promises {promised} bytes of {dtype}, and others are there")
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if dtype.kind == "U" and (_numbers(array) > sys.maxunicode).any():
        raise NoArrays(f"{name} holds text of no characters")
    return array


def _numbers(text: np.ndarray) -> np.ndarray:
    """The numbers of the characters of an array of text, of which numpy itself looks at none."""
    return np.ascontiguousarray(text).reshape(-1).view(np.dtype("u4").newbyteorder(text.dtype.byteorder))


def _promised(file: IO[bytes], name: str) -> tuple[int, int, np.dtype]:
    """Bytes of an array by its header, where they begin, and their dtype."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise NoArrays(f"{name} has a .npy header of version {version}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject or dtype.kind == "V" or any(n < 0 for n in shape):
        raise NoArrays(f"{name} holds objects or records, or has a negative length")
    return math.prod(shape) * dtype.itemsize, file.tell(), dtype
