"""Archives that lie, reach out or blow up: what `cmt data import` must refuse. Each case writes one file or folder.

`python -m tests.train.hostile FOLDER` imports all of them and prints by how many bytes the process grew.
"""

from __future__ import annotations

import io
import json
import os
import resource
import stat
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from tests.train.synthetic import bomb

SHAPE = (8, 4, 4)


def npy(values=None, header: str | None = None, version: int = 1, length: int | None = None) -> bytes:
    """A row as .npy bytes, or one with a header of one's own."""
    values = np.abs(np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32) if values is None else values
    if header is None:
        out = io.BytesIO()
        np.save(out, values, allow_pickle=True)
        return out.getvalue()
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + values.tobytes()


def written(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], how=zipfile.ZIP_STORED) -> bytes:
    """A zip file of members; its bytes too."""
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in members:
            file.writestr(name, data)
    return path.read_bytes()


def patched(path: Path, data: bytes, *pairs: tuple[bytes, bytes]) -> None:
    """Write data with every occurrence of some bytes replaced."""
    for old, new in pairs:
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)


def labelled(path: Path, labels, rows: int = 2) -> None:
    """Two sound rows and a dataset.json."""
    text = labels if isinstance(labels, (str, bytes)) else json.dumps({"labels": labels})
    written(path, [(f"{k}.npy", npy()) for k in range(rows)] + [("dataset.json", text)])


def info(name: str, mode: int = 0, flags: int = 0) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name)
    found.external_attr, found.flag_bits = mode << 16, flags
    return found


def resized(path: Path, declared: int, actual: int, how: int) -> None:
    """A zip whose one member declares another size than it has, in both of its headers."""
    data = written(path, [("0.npy", npy(np.ones((8, 8, 8), np.float32)))], how)
    patched(path, data, (struct.pack("<I", actual), struct.pack("<I", declared)))


def overlapping(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0.npy", npy())
        file.writestr("1.npy", npy())
        file.filelist[1].header_offset = 0


def in_tar(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> None:
    with tarfile.open(path, mode) as file:
        sound = tarfile.TarInfo("0.npy")
        sound.size = len(npy())
        file.addfile(sound, io.BytesIO(npy()))
        for m in members:
            file.addfile(m, io.BytesIO(bytes(m.size)))


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, target, size
    return found


def linked(folder: Path) -> None:
    folder.mkdir()
    (folder / "0.npy").write_bytes(npy())
    os.symlink("/etc/passwd", folder / "1.npy")


def features(folder: Path, labels: int) -> None:
    for k in range(3):
        for name, data in (("features", npy()), ("labels", npy(np.array([k])))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if name == "features" or k < labels:
                (folder / name / f"{k}.npy").write_bytes(data)


def tensors(folder: Path, latents=(3, 4, 2, 2), labels=3, change=lambda data: data) -> None:
    from safetensors.numpy import save

    folder.mkdir()
    data = save(
        {
            "latents": np.random.default_rng(0).normal(size=latents).astype(np.float32),
            "labels": np.zeros(labels, np.int64),
        }
    )
    (folder / "a.safetensors").write_bytes(change(data))


def header(data: bytes, change) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def offsets(tree: dict) -> dict:
    tree["latents"]["data_offsets"], tree["labels"]["data_offsets"] = [0, 192], [0, 24]
    return tree


H = "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}}}"
SOUND = ("ok.npy", npy())
one = lambda name: lambda p: written(p, [SOUND, (name, npy())])
row = lambda data: lambda p: written(p, [("0.npy", data)])
SIZE = len(npy(np.ones((8, 8, 8), np.float32)))
DEEP = '{"labels": ' + "[" * 200_000 + "]" * 200_000 + "}"
SIGNATURES = (b"PK\1\2\x14\x03\x14\0", b"PK\3\4\x14\0")  # what comes before a member's flags

ZIPS = {
    "absolute": one("/tmp/evil.npy"),
    "parent": one("../evil.npy"),
    "parent inside": one("a/../../evil.npy"),
    "backslash": one("..\\evil.npy"),
    "drive": one("C:/evil.npy"),
    "double slash": one("a//evil.npy"),
    "control character": one("a\x1b[2Jb.npy"),
    "nul": lambda p: patched(p, written(p, [SOUND, ("evilX.npy", npy())]), (b"evilX", b"evil\0")),
    "long name": one("a" * 500 + ".npy"),
    "link": lambda p: written(p, [SOUND, (info("1.npy", stat.S_IFLNK | 0o777), b"/etc/passwd")]),
    "device": lambda p: written(p, [SOUND, (info("1.npy", stat.S_IFCHR | 0o666), b"")]),
    "fifo": lambda p: written(p, [SOUND, (info("1.npy", stat.S_IFIFO | 0o666), b"")]),
    "twice": lambda p: patched(p, written(p, [("0.npy", npy()), ("1.npy", npy())]), (b"1.npy", b"0.npy")),
    "encrypted": lambda p: patched(p, written(p, [SOUND]), *((s + bytes(2), s + b"\1\0") for s in SIGNATURES)),
    "bomb": lambda p: written(p, [("0.npy", npy(np.zeros((8, 1024, 1024), np.float32)))], zipfile.ZIP_DEFLATED),
    "json bomb": lambda p: written(p, [SOUND, ("dataset.json", " " * (200 << 20))], zipfile.ZIP_DEFLATED),
    "longer than declared": lambda p: resized(p, SIZE - 128, SIZE, zipfile.ZIP_DEFLATED),
    "shorter than declared": lambda p: resized(p, SIZE + 128, SIZE, zipfile.ZIP_DEFLATED),
    "huge member": lambda p: resized(p, 3_000_000_000, SIZE, zipfile.ZIP_DEFLATED),
    "stored, other size": lambda p: patched(
        p, written(p, [SOUND]), (struct.pack("<II", len(npy()), len(npy())), struct.pack("<II", len(npy()), 10))
    ),
    "overlap": overlapping,
    "crc": lambda p: patched(p, written(p, [SOUND]), (npy()[-64:], bytes(64))),
    "local name": lambda p: p.write_bytes(written(p, [SOUND]).replace(b"ok.npy", b"no.npy", 1)),
    "bzip2": lambda p: written(p, [SOUND], zipfile.ZIP_BZIP2),
    "cut": lambda p: p.write_bytes(written(p, [SOUND, ("1.npy", npy())])[:-40]),
    "no members": lambda p: written(p, []),
    "no rows": lambda p: written(p, [("readme.txt", "x")]),
    "pickle": row(npy(np.array([{"a": 1}], dtype=object))),
    "huge shape": row(npy(header=H.format(d="'<f4'", f=False, s="(8, 1000000000, 1000000000)"))),
    "wrong shape": row(npy(header=H.format(d="'<f4'", f=False, s="(8, 4, 5)"))),
    "negative shape": row(npy(header=H.format(d="'<f4'", f=False, s="(8, -4, -4)"))),
    "bool shape": row(npy(header=H.format(d="'<f4'", f=False, s="(8, 4, 4, True)"))),
    "code in header": row(npy(header="__import__('os').system('touch pwned')")),
    "code in dtype": row(npy(header=H.format(d="__import__('os').system('touch pwned')", f=False, s="(8, 4, 4)"))),
    "long header": row(npy(header="{}", version=2, length=4_000_000_000)),
    "nested header": row(npy(header="(" * 5000 + ")" * 5000)),
    "fortran": row(npy(np.asfortranarray(np.ones(SHAPE, np.float32)))),
    "structured": row(npy(np.zeros(4, [("a", "<f4")]))),
    "complex": row(npy(np.ones(SHAPE, np.complex64))),
    "text array": row(npy(np.full(SHAPE, "abc"))),
    "vector": row(npy(np.ones(8, np.float32))),
    "odd channels": row(npy(np.ones((7, 4, 4), np.float32))),
    "empty row": row(npy(np.ones((8, 0, 4), np.float32))),
    "nan": row(npy(np.full(SHAPE, np.nan, np.float32))),
    "above fp16": row(npy(np.full(SHAPE, 1e6, np.float32))),
    "negative std": row(npy(-np.ones(SHAPE, np.float32))),
    "mixed shapes": lambda p: written(p, [("0.npy", npy()), ("1.npy", npy(np.ones((8, 2, 2), np.float32)))]),
    "late mixed shape": lambda p: written(
        p, [(f"{k:03d}.npy", npy()) for k in range(70)] + [("999.npy", npy(np.ones((8, 2, 2), np.float32)))]
    ),
    "constant": lambda p: written(p, [(f"{k}.npy", npy(np.zeros(SHAPE, np.float32))) for k in range(3)]),
    "no json": lambda p: labelled(p, b"\xff\xfe{"),
    "deep json": lambda p: labelled(p, DEEP),
    "json list": lambda p: labelled(p, "[]"),
    "labels of text": lambda p: labelled(p, '{"labels": "evil"}'),
    "negative label": lambda p: labelled(p, [["0.npy", 1], ["1.npy", -1]]),
    "huge label": lambda p: labelled(p, [["0.npy", 1], ["1.npy", 2**70]]),
    "nan label": lambda p: labelled(p, '{"labels": [["0.npy", NaN], ["1.npy", 0]]}'),
    "bool label": lambda p: labelled(p, [["0.npy", True], ["1.npy", 0]]),
    "one-hot label": lambda p: labelled(p, [["0.npy", [0, 1]], ["1.npy", [1, 0]]]),
    "label of none": lambda p: labelled(p, [["0.npy", 1], ["1.npy", 0], ["../2.npy", 0]]),
    "no label": lambda p: labelled(p, [["0.npy", 1]]),
    "label twice": lambda p: labelled(p, [["0.npy", 1], ["0.npy", 0]]),
}
TARS = {
    "tar link": lambda p: in_tar(p, tar_member("1.npy", tarfile.SYMTYPE, "/etc/passwd")),
    "tar hard link": lambda p: in_tar(p, tar_member("1.npy", tarfile.LNKTYPE, "0.npy")),
    "tar device": lambda p: in_tar(p, tar_member("1.npy", tarfile.CHRTYPE)),
    "tar fifo": lambda p: in_tar(p, tar_member("1.npy", tarfile.FIFOTYPE)),
    "tar parent": lambda p: in_tar(p, tar_member("../1.npy", size=8)),
    "tar absolute": lambda p: in_tar(p, tar_member("/tmp/1.npy", size=8)),
    "tar twice": lambda p: in_tar(p, tar_member("0.npy", size=8)),
    "tar cut": lambda p: (in_tar(p, tar_member("1.npy", size=8000)), p.write_bytes(p.read_bytes()[:3000])),
    "tar sparse": lambda p: in_tar(p, tar_member("1.npy", tarfile.GNUTYPE_SPARSE)),
    "tar compressed": lambda p: in_tar(p, mode="w:gz"),
    "garbage": lambda p: p.write_bytes(bytes(range(256)) * 20),
    "empty file": lambda p: p.write_bytes(b""),
}
# format of the import, what is written
CASES = {
    **{k: ("edm2", v) for k, v in (ZIPS | TARS).items()},
    "folder with a link": ("edm2", linked),
    "labels short": ("npy", lambda p: features(p, 2)),
    "labels none": ("npy", lambda p: (features(p, 3), (p / "labels" / "1.npy").write_bytes(npy(np.ones(2))))),
    "png bomb": ("edm", lambda p: written(p, [("0.png", bomb())])),
    "png noise": ("edm", lambda p: written(p, [("0.png", bomb()[:40])])),
    "html for png": ("edm", lambda p: written(p, [("0.png", b"<html>")])),
    "tensors cut": ("lightningdit", lambda p: tensors(p, change=lambda d: d[:-8])),
    "tensors long header": ("lightningdit", lambda p: tensors(p, change=lambda d: struct.pack("<Q", 1 << 60) + d[8:])),
    "tensors overlap": ("lightningdit", lambda p: tensors(p, change=lambda d: header(d, offsets))),
    "tensors few labels": ("lightningdit", lambda p: tensors(p, labels=2)),
    "tensors flat": ("lightningdit", lambda p: tensors(p, latents=(3, 4))),
    "tensors linked": ("lightningdit", lambda p: (p.mkdir(), os.symlink("/etc/passwd", p / "a.safetensors"))),
}  # fmt: skip


def attempt(folder: Path, name: str) -> str:
    """Import a case written into `folder`; the error's text, "" if there was none."""
    from cmt_fast.data.archives import DatasetError
    from cmt_fast.data.foreign import convert

    try:
        convert(
            folder / "case", folder / "out", CASES[name][0], dtype="float16", kind="mean", flip=False, shard_rows=32
        )
    except DatasetError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    import cmt_fast.data.foreign  # noqa: F401

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    base, before, refused = Path(sys.argv[1]), peak(), 0
    for k, case in enumerate(CASES):
        refused += bool(attempt(base / str(k), case))
    print(json.dumps({"refused": refused, "grown_bytes": peak() - before}))
