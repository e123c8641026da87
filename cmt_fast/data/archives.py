"""Files of others, read in place: zip, tar and folders behind one class, NumPy arrays without pickles.

Nothing is ever extracted. Names, sizes and headers are untrusted: all of them are checked before the first member is
read, and a read gives exactly the bytes that were declared or raises DatasetError, one line that names the archive.
"""

from __future__ import annotations

import ast
import json
import math
import re
import stat
import struct
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from cmt_fast.config.errors import ConfigError, one_line
from cmt_fast.data.arrays import is_zip

MEMBER_BYTES = 64 << 20  # of one array or image
JSON_BYTES = 256  # of a .json file for each file in the archive, beside a first MiB; EDM2's has 45
RATIO = 200  # decompressed over compressed bytes; arrays and images are far below, deflate's limit is 1032
BLANK = 4 << 20  # bytes of a member that may be above it: one colour, or zeros


class DatasetError(ConfigError):
    """A data set is damaged, hostile or of another kind: one line that names the file and what is wrong."""


class Archive:
    """A zip file, an uncompressed tar file or a folder. `names`: its files, sorted. Raises DatasetError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: dict[str, int] = {}
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        if path.is_dir():
            self._folder()
        elif not path.is_file():
            raise DatasetError(f"{path}: is no file and no folder")
        elif is_zip(path):
            self._open_zip()
        else:
            self._open_tar()
        self.names = sorted(self._sizes)
        if not self.names:
            raise DatasetError(f"{path}: is empty")

    def _folder(self) -> None:
        for file in self.path.rglob("*"):
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise DatasetError(f"{self.path}: {str(file.relative_to(self.path))!r} is a link or a device")
            if file.is_file():
                self._sizes[file.relative_to(self.path).as_posix()] = file.stat().st_size

    def _open_zip(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except Exception as error:  # zipfile raises nearly every kind for a damaged file
            raise DatasetError(f"{self.path}: is no sound zip archive ({one_line(str(error), 160)})") from None
        size = self.path.stat().st_size
        places: list[tuple[int, int, str]] = []
        for m in self._zip.infolist():
            kind = stat.S_IFMT(m.external_attr >> 16)
            self._name(m.orig_filename if "\0" in m.orig_filename else m.filename, m.filename.endswith("/"))
            if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise DatasetError(f"{self.path}: {m.filename!r} is a link or a device")
            if m.flag_bits & 0x1:
                raise DatasetError(f"{self.path}: {m.filename!r} is encrypted")
            if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DatasetError(f"{self.path}: {m.filename!r} is neither stored nor deflated")
            if m.filename.endswith("/"):
                continue
            if m.compress_type == zipfile.ZIP_STORED and m.compress_size != m.file_size:
                raise DatasetError(
                    f"{self.path}: {m.filename!r} is stored in {m.compress_size} bytes, not {m.file_size}"
                )
            if m.file_size > max(RATIO * m.compress_size, BLANK):
                raise DatasetError(f"{self.path}: {m.filename!r} grows {RATIO} times and more when it is read")
            places.append((m.header_offset, m.header_offset + 30 + m.compress_size, m.filename))
            self._add(m.filename, m.file_size)
        places.sort()
        for (_, end, name), (start, _, _) in zip(places, [*places[1:], (size, 0, "")]):
            if end > start:
                raise DatasetError(f"{self.path}: {name!r} overlaps with what follows it")

    def _open_tar(self) -> None:
        try:
            self._tar = tarfile.open(self.path, "r:")  # noqa: SIM115  open as long as the archive is
            for m in self._tar:
                self._name(m.name, m.isdir())
                if m.isdir():
                    continue
                if m.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DatasetError(f"{self.path}: {m.name!r} is a link or a device")
                if m.offset_data + m.size > self.path.stat().st_size:
                    raise DatasetError(f"{self.path}: {m.name!r} is longer than the archive")
                self._add(m.name, m.size)
        except DatasetError:
            raise
        except Exception as error:  # as above
            why = one_line(str(error), 160)
            raise DatasetError(f"{self.path}: is no zip and no uncompressed tar archive ({why})") from None

    def _name(self, name: str, folder: bool) -> None:
        parts = name.removesuffix("/").split("/") if folder else name.split("/")
        if not name or re.search(r"[\x00-\x1f\x7f\\]", name) or PurePosixPath(name).is_absolute() or ":" in parts[0]:
            raise DatasetError(f"{self.path}: the member {name[:80]!r} has no proper name")
        if any(p in ("", "..") for p in parts) or len(name) > 400:
            raise DatasetError(f"{self.path}: the member {name[:80]!r} does not stay inside")

    def _add(self, name: str, size: int) -> None:
        if name in self._sizes:
            raise DatasetError(f"{self.path}: {name!r} appears twice")
        self._sizes[name] = size

    def size(self, name: str) -> int:
        """Declared bytes of a member."""
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        """The bytes of a member: as many as declared. Raises DatasetError."""
        if name not in self._sizes:
            raise DatasetError(f"{self.path}: has no {name!r}")
        declared = self._sizes[name]
        if declared > ((1 << 20) + JSON_BYTES * len(self.names) if name.endswith(".json") else MEMBER_BYTES):
            raise DatasetError(f"{self.path}: {name!r} has {declared:,} bytes, that is too many")
        try:
            with self._stream(name) as stream:
                out = stream.read(declared + 1)
        except Exception as error:  # as above
            raise DatasetError(f"{self.path}: {name!r} cannot be read ({one_line(str(error), 160)})") from None
        if len(out) != declared:
            raise DatasetError(f"{self.path}: {name!r} has not the {declared:,} bytes that it declares")
        return out

    def _stream(self, name: str) -> IO[bytes]:
        if self._zip:
            return self._zip.open(name)
        if self._tar:
            stream = self._tar.extractfile(name)  # a file object over the archive, nothing is written
            assert stream is not None
            return stream
        return open(self.path / name, "rb")

    def close(self) -> None:
        """Close the archive's file."""
        for file in (self._zip, self._tar):
            if file:
                file.close()


def array(data: bytes, where: str) -> np.ndarray:
    """A .npy file's numbers. Raises DatasetError for objects, for other sizes than the header says, for no .npy."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise DatasetError(f"{where}: is no .npy array")
    wide = data[6] > 1
    length, start = struct.unpack_from("<I" if wide else "<H", data, 8)[0], 12 if wide else 10
    if length > 10_000 or start + length > len(data):
        raise DatasetError(f"{where}: has a .npy header of {length} bytes")
    try:
        header = ast.literal_eval(data[start : start + length].decode("latin1").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        dtype = np.dtype(descr) if isinstance(descr, str) else None
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise DatasetError(f"{where}: has no sound .npy header") from None
    if dtype is None or dtype.kind not in "fiu" or dtype.itemsize > 8 or fortran is not False:
        raise DatasetError(f"{where}: holds {str(descr)[:40]!r}, not plain numbers in C order")
    if not isinstance(shape, tuple) or len(shape) > 8 or any(type(k) is not int or not 0 <= k < 2**48 for k in shape):
        raise DatasetError(f"{where}: has the shape {str(shape)[:40]}")
    if math.prod(shape) * dtype.itemsize != len(data) - start - length:
        raise DatasetError(f"{where}: has {len(data) - start - length:,} bytes of numbers, not {shape} of {dtype}")
    try:
        return np.frombuffer(data, dtype, offset=start + length).reshape(shape)
    except ValueError:
        raise DatasetError(f"{where}: has the shape {str(shape)[:40]}") from None


def parse(data: bytes, where: str) -> Any:
    """JSON. Raises DatasetError."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise DatasetError(f"{where}: is no sound JSON ({str(error)[:80]})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def labels_in(path: Path) -> bool:
    """Whether a file is a dataset.json as EDM's tools write it, with labels in it."""
    try:
        body = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError, MemoryError):
        return False
    return isinstance(body, dict) and isinstance(body.get("labels"), list) and any(body["labels"])
