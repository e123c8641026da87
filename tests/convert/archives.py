"""Hostile `.pt` and `.safetensors` files."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from tests.convert.hostile import P2, called, file, named, text

SOUND = {"ema": {"a.weight": torch.ones(2, 3)}, "args": argparse.Namespace(model="S/2")}


class _Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def zipped(
    tree: bytes, how: int = zipfile.ZIP_STORED, data: bytes = b"\0" * 24, name: str = "archive/data.pkl", **more
) -> bytes:
    """An archive as torch writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        archive.writestr(name, tree)
        archive.writestr("archive/byteorder", b"little", zipfile.ZIP_STORED)
        archive.writestr("archive/data/0", data, zipfile.ZIP_STORED)
        archive.writestr("archive/version", b"3\n", zipfile.ZIP_STORED)
        for key, value in more.items():
            archive.writestr(key.replace("__", "/"), value)
    return out.getvalue()


def saved(tree, **how) -> bytes:
    out = io.BytesIO()
    torch.save(tree, out, **how)
    return out.getvalue()


def tensor(count: int, size: int, kind: str = "FloatStorage") -> bytes:
    """{"a": tensor of `size`} over storage 0 that is said to have `count` numbers."""
    whole = lambda n: b"\x8a\x08" + struct.pack("<q", n)
    storage = b"(" + text("storage") + named(f"torch.{kind}") + text("0") + text("cpu") + whole(count) + b"tQ"
    made = called(
        "torch._utils._rebuild_tensor_v2", storage, b"K\x00", whole(size) + b"\x85", b"K\x01\x85", b"\x89", b"}"
    )
    return file(b"}" + text("a") + made + b"s")


def header(text: bytes, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def cases(canary: str) -> dict[str, bytes]:
    """Name -> file. None may be read, and nothing in it may run."""
    shell = _Shell(f"touch {canary}")
    system = called("os.system", text(f"touch {canary}"))
    out = {
        "os.system in a .pt": saved({"ema": {"a": torch.ones(1)}, "x": shell}),
        "os.system alone": saved(shell),
        "os.system in a .pt of old": saved({"x": shell}, _use_new_zipfile_serialization=False),
        "eval by hand": zipped(file(called("builtins.eval", text("1")))),
        "getattr by hand": zipped(file(called("builtins.getattr", text("a"), text("b")))),
        "torch.load by hand": zipped(file(called("torch.load", text(canary)))),
        "a module": saved(torch.nn.Linear(2, 2)),
        "a function": saved({"f": torch.nn.functional.relu}),
        "inst": zipped(file(b"(" + text("x") + b"ios\nsystem\n")),
        "obj": zipped(file(b"(" + named("os.system") + text("x") + b"o")),
        "ext": zipped(file(b"\x82\x01")),
        "frame of 2^62": zipped(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."),
        "memo entry of 2^31": zipped(file(b"}r" + struct.pack("<I", 2**31 - 1))),
        "cut pickle": zipped(P2 + b"}"),
        "empty pickle": zipped(b""),
        "no pickle": zipped(file(b"}"), name="archive/other.pkl"),
        "two pickles": zipped(file(b"}"), other__data__pkl=b"", **{"more/data.pkl": file(system)}),
        "a deflated pickle": zipped(file(b"}"), zipfile.ZIP_DEFLATED),
        "a bomb": zipped(P2 + b"]" * (1 << 22), zipfile.ZIP_DEFLATED),
        "a path upwards": zipped(file(b"}"), **{"archive/../../up": b"x"}),
        "an absolute path": zipped(file(b"}"), **{"/etc/x": b"x"}),
        "a tensor past its storage": zipped(tensor(6, 100)),
        "a storage past the file": zipped(tensor(2**40, 2**40)),
        "a storage that is not there": zipped(tensor(6, 6).replace(text("0"), text("7"))),
        "a storage of no kind": zipped(tensor(6, 6, "Module")),
        "a list": saved([torch.ones(2)]),
        "a tensor alone": saved(torch.ones(2)),
        "numbers alone": saved({"a": 1, "b": {"c": 2}}),
        "cut archive": saved(SOUND)[:-30],
        "archive of nothing": b"PK\x05\x06" + b"\0" * 18,
        "not an archive": b"PK\x03\x04" + b"x" * 100,
        "a .pt of old, cut": saved(SOUND["ema"], _use_new_zipfile_serialization=False)[:-5],
        "a plain pickle of os.system": pickle.dumps({"ema": shell}),
        "empty": b"",
        "text": b"hello world, this is no checkpoint",
        "gzip": zlib.compress(b"x" * 100),
        "safetensors, header past the file": struct.pack("<Q", 2**40) + b'{"a":1}',
        "safetensors, header of no JSON": header(b"{nothing}"),
        "safetensors, header cut": header(b'{"a":{"dtype":"F32"')[:-12],
        "safetensors, past its data": header(json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()),
        "safetensors, overlapping": header(
            json.dumps({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}).encode()
        ),
        "safetensors, shape of 2^62": header(
            json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}}).encode()
        ),
        "safetensors, its own words damaged": header(
            b'{"__metadata__":{"cmt-fast":"[1]"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),
        "safetensors of nothing": header(b"{}", b""),
    }  # fmt: skip
    return out


def twice(path: Path, write: Callable[[zipfile.ZipFile], None]) -> None:
    """An archive with one name twice, which zipfile warns of."""
    with zipfile.ZipFile(path, "w") as archive:
        write(archive)
        write(archive)
