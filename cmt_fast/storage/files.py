"""Small files that are whole or not there, and checksums of large ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import xxhash
from torch import Tensor


def checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file whole, by rename."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    sync(temporary)
    os.replace(temporary, path)


def save_file(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises OSError where it cannot be written, as any other file; the library has an error of its own."""
    try:
        safetensors.torch.save_file(dict(tensors), path, about)
    except safetensors.SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
