"""One pass over a file: the bytes of the library, hashed once and only if they are read, and no damage goes unnoticed."""

from __future__ import annotations

import os
import random

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from cmt_fast.storage import checkpoint, tensor_file
from cmt_fast.storage.checkpoint import Damaged, Tensors

NAMED = {"net.b": (3,), "net.a": (5, 7), "é": (2,), 'q"': (), "none": (0, 4), "net.A": (1, 1)}


def streamed(tensors: dict[str, torch.Tensor]) -> Tensors:
    return Tensors({name: tuple(x.shape) for name, x in tensors.items()}, tensors.__getitem__)


@pytest.fixture
def found(tmp_path, monkeypatch):
    """A checkpoint of two files, written long ago."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in NAMED.items()}
    files = {"model": streamed(tensors), "ema-0": streamed({name: x * 2 for name, x in tensors.items()})}
    folder = checkpoint.save(tmp_path, 1, files, {"done": True, "nimg": 1})
    monkeypatch.setattr(tensor_file, "RACY_NS", -1)
    return checkpoint.sized(folder)


def spent(call) -> int:
    """Bytes that a call reads."""
    before = tensor_file.read_bytes
    call()
    return tensor_file.read_bytes - before


def test_the_bytes_and_the_checksum_are_those_of_the_library(found, tmp_path):
    save_file(dict(found.stream("model").items()), tmp_path / "library")
    for name in ("model", "ema-0"):
        data = (found.folder / f"{name}.safetensors").read_bytes()
        assert found.manifest["files"][f"{name}.safetensors"] == {
            "bytes": len(data),
            "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        }
    assert (tmp_path / "library").read_bytes() == (found.folder / "model.safetensors").read_bytes()


def test_a_file_is_read_once_and_only_if_its_tensors_are(found, monkeypatch):
    size = found.manifest["files"]["model.safetensors"]["bytes"]
    hashed = []
    real = xxhash.xxh3_128

    class Counted:
        def __init__(self, data: bytes = b"") -> None:
            self.state = real(data)

        def update(self, data) -> None:
            hashed.append(len(data))
            self.state.update(data)

        def hexdigest(self) -> str:
            return self.state.hexdigest()

    monkeypatch.setattr(tensor_file.xxhash, "xxh3_128", Counted)
    assert spent(lambda: checkpoint.complete(found.folder.parents[1])) == 0
    assert spent(lambda: found.tensors("model")) == size == sum(hashed)  # and nothing of the EMA
    hashed.clear()
    found.tensors("model")
    assert not hashed  # it is known by now
    checkpoint.verify(found.folder)
    assert sum(hashed) == found.manifest["files"]["ema-0.safetensors"]["bytes"]


def _head(found) -> int:
    data = (found.folder / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_in_another_order_the_file_is_hashed_first(found):
    stream, size = found.stream("model"), found.manifest["files"]["model.safetensors"]["bytes"]
    last = list(stream)[-1]
    want = found.tensors("model")[last]
    os.utime(found.folder / "model.safetensors", (1e9 + 1, 1e9 + 1))  # another file, to this process
    stream = found.stream("model")
    assert spent(lambda: torch.testing.assert_close(stream[last], want)) == size - _head(found) + want.nbytes
    flipped(found.folder / "model.safetensors", size - 1)
    os.utime(found.folder / "model.safetensors", (1e9 + 2, 1e9 + 2))
    with pytest.raises(Damaged, match="does not match its checksum"):
        found.stream("model")[last]


def flipped(path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_no_flipped_bit_comes_through_a_whole_pass(found):
    """Of tensors, of names, shapes and offsets: the pass does not end, and the checkpoint is passed over from then on."""
    path, dice = found.folder / "model.safetensors", random.Random(1)
    good, stage = path.read_bytes(), found.folder.parents[1]
    for i in range(200):
        path.write_bytes(good)
        flipped(path, dice.randrange(len(good)) if i % 2 else dice.randrange(_head(found)), dice.randrange(8))
        os.utime(path, (1e9 + i, 1e9 + i))
        assert checkpoint.newest(stage).manifest["step"] == 1  # nobody has looked yet
        with pytest.raises(Damaged):
            stream = found.stream("model")
            for name in NAMED:  # in an order of its own, as a network of other names would
                if name in stream:
                    stream[name]
            stream.check()
        with pytest.raises(checkpoint.CheckpointError, match="none of its 1"):
            checkpoint.newest(stage)


def test_what_changes_within_a_tick_of_the_clock_is_not_remembered(found, monkeypatch):
    monkeypatch.undo()
    path = found.folder / "ema-0.safetensors"
    os.utime(path)
    now = path.stat().st_mtime_ns
    checkpoint.verify(found.folder)
    flipped(path, 200)
    os.utime(path, ns=(now, now))  # the same path, inode, size and time
    with pytest.raises(Damaged):
        checkpoint.verify(found.folder)


def test_a_change_that_keeps_a_files_time_is_seen(found):
    path, old = found.folder / "ema-0.safetensors", os.stat(found.folder / "ema-0.safetensors")
    checkpoint.verify(found.folder)
    flipped(path, 200)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    with pytest.raises(Damaged):
        checkpoint.verify(found.folder)


def test_what_changes_while_it_is_read_is_not_remembered(found, monkeypatch):
    """Neither as sound, nor, where a whole file took its place, as damaged."""
    path = found.folder / "ema-0.safetensors"
    real, size = tensor_file._read, path.stat().st_size

    def changing(handle, into, at):
        got = real(handle, into, at)
        if got and at + got == size:
            flipped(path, size - 1)
            os.utime(path)
        return got

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "_read", changing)
        assert tensor_file.checksum(path) == found.manifest["files"][path.name]["xxh3_128"]
    assert tensor_file.remembered(path) is None
    stream, whole = found.stream("ema-0"), path.with_name("whole")
    whole.write_bytes(path.read_bytes())
    flipped(whole, size - 1)
    os.replace(whole, path)
    with pytest.raises(Damaged):
        stream.check()
    assert len(found.tensors("ema-0")) == len(NAMED)
