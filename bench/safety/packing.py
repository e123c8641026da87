"""Archives out of a case's bytes, so that a fuzzer changes what is in them and not their checksums."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator

NAMES = (
    "dataset.json", "00000/img00000000.npy", "00000/img00000001.npy", "a/0.npy", "b/1.npy", "x_features/0.npy", "x_labels/0.npy",
    "a/0.png", "a/1.png", "mu.npy", "sigma.npy", "features.npy", "extractor.npy", "num_images.npy", "labels.npy", "arr_0.npy",
    "images.npy", "counts.npy",
)  # fmt: skip


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an archive to be: of each a byte for its name, two for its length, its bytes."""
    at = 0
    while at + 3 <= len(data) and at < 1 << 16:
        size = int.from_bytes(data[at + 1 : at + 3], "little")
        yield NAMES[data[at] % len(NAMES)], data[at + 3 : at + 3 + size]
        at += 3 + size


def packed(parts: list[tuple[str, bytes]]) -> bytes:
    """The reverse of `members`."""
    return b"".join(bytes([NAMES.index(name)]) + struct.pack("<H", len(body)) + body for name, body in parts)


def zipped(data: bytes, how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, body in dict(members(data)).items():
            archive.writestr(zipfile.ZipInfo(name), body, how)
    return out.getvalue()


def tarred(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, body in members(data):
            about = tarfile.TarInfo(name)
            about.size = len(body)
            archive.addfile(about, io.BytesIO(body))
    return out.getvalue()
