"""Small files that are whole or not there, and checksums of large ones."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash


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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, by rename, of what can be made again: nothing waits for the disk."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file whole, by rename."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    sync(temporary)
    os.replace(temporary, path)
