"""`cmt data encode`: a folder of images, class folder by class folder, through an autoencoder into a store.

Images are decoded by threads (PIL works outside the interpreter's lock) and encoded in batches that never cross a
shard; shards are dealt over ranks. So a shard's bytes depend on its images and settings alone, not on what was
killed before or on how many ranks there are.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Codec
from cmt_fast.data.latents import Index
from cmt_fast.data.writing import Layout, Rows, Writer, key_of
from cmt_fast.render import grids
from cmt_fast.runtime import distributed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CROP = "centre, boxes then bicubic"
FILE_BYTES = 256 << 20
SKIP = " (--broken skip leaves such images out)"


class Picture(NamedTuple):
    """A file of the folder: name below it, bytes, class."""

    name: str
    size: int
    label: int | None


class Chunk(NamedTuple):
    """The pictures of one shard, and whether their mirror images are its rows."""

    pictures: list[Picture]
    mirror: bool


class Settings(NamedTuple):
    """What a store's rows depend on besides the images and the autoencoder."""

    size: int
    kind: str = "mean+std"
    dtype: str = "float16"
    precision: str = "fp32"
    batch: int = 16
    flip: bool = False


def listing(source: Path) -> tuple[list[Picture], list[str]]:
    """All images below `source`, sorted by class folder and name, and the names of classes; [] where there are none.

    Raises DatasetError when there is no image, or images lie both in class folders and beside them.
    """
    if not source.is_dir():
        raise DatasetError(f"{source}: is not a folder")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = _pictures(source, source.iterdir(), None)
    classed = [(f, _pictures(source, f.rglob("*"), k)) for k, f in enumerate(folders)]
    found = [p for _, pictures_ in classed for p in pictures_]
    if found and loose:
        raise DatasetError(f"{source}: has images in class folders and beside them ({loose[0].name})")
    if not found and not loose:
        raise DatasetError(f"{source}: holds no image ({', '.join(SUFFIXES)})")
    return (found, [text(f.name) for f in folders]) if found else (loose, [])


def _pictures(source: Path, paths, label: int | None) -> list[Picture]:
    files = [p for p in paths if p.suffix.lower() in SUFFIXES and (p.is_file() or p.is_symlink())]
    return sorted(Picture(p.relative_to(source).as_posix(), p.stat().st_size, label) for p in files)


def text(name: str) -> str:
    """A file's name as proper Unicode."""
    return os.fsencode(name).decode("utf-8", "replace")


def encode(
    source: Path,
    out: Path,
    codec: Codec,
    settings: Settings,
    *,
    shard_rows: int,
    skip_broken: bool = False,
    workers: int = 4,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Index | None:
    """Write OUT, or go on with it. tell(images done, all of them), of this rank. Returns the index on rank 0.

    Raises DatasetError for a source or OUT that cannot be used, and for a broken image unless those are skipped.
    """
    images, classes = listing(source)
    if settings.size % codec.factor:
        raise DatasetError(f"--size: {settings.size} is no multiple of {codec.factor}, the autoencoder's factor")
    chunks = [images[i : i + shard_rows] for i in range(0, len(images), shard_rows)]
    work = [Chunk(chunk, mirror) for mirror in ((False, True) if settings.flip else (False,)) for chunk in chunks]
    digest = codec.digest
    keys = [
        key_of(settings, digest, CROP, [(text(p.name), *p[1:]) for p in pictures], mirror) for pictures, mirror in work
    ]
    writer, rank = Writer(out), distributed.rank()
    if rank == 0:
        writer.start()
    distributed.barrier()
    side = settings.size // codec.factor
    layout = Layout(settings.kind, settings.dtype, (codec.channels * (1 + (settings.kind == "mean+std")), side, side))
    mine = range(rank, len(work), distributed.size())
    done, total = 0, sum(len(work[k].pictures) for k in mine)
    with contextlib.ExitStack() as held:
        held.enter_context(writer.lock_together())
        pool = held.enter_context(ThreadPoolExecutor(workers, "images"))
        for k in mine:
            before = writer.record(k, keys[k])
            if before and before["notes"] and not skip_broken:
                raise DatasetError(f"{source / before['notes'][0][0]}: {before['notes'][0][1]}{SKIP}")
            if before is None:
                with writer.shard(k, layout, keys[k]) as rows:
                    told = functools.partial(_told, tell, done, total)
                    _fill(rows, source, work[k], codec, settings, skip_broken, pool, told)
            done += len(work[k].pictures)
            tell(done, total)
        distributed.barrier()
        if rank:
            return None
        facts = {
            "flips": settings.flip, "class_names": classes, "vae": codec.name, "vae_xxh3_128": digest,
            "crop": f"{CROP}, {settings.size}", "source": f"images {text(source.resolve().name)}",
        }  # fmt: skip
        return writer.finish(layout, keys, facts)


def _told(tell: Callable[[int, int], None], before: int, total: int, n: int) -> None:
    tell(before + n, total)


def _fill(
    rows: Rows, source: Path, chunk: Chunk, codec: Codec, settings: Settings, skip_broken: bool,
    pool: ThreadPoolExecutor, tell: Callable[[int], None],
) -> None:  # fmt: skip
    batch: list[tuple[Picture, np.ndarray]] = []
    for done, (picture, found) in enumerate(_decoded(source, chunk, settings, pool), 1):
        if isinstance(found, np.ndarray):
            batch.append((picture, found))
        elif skip_broken:
            rows.notes += [] if chunk.mirror else [(text(picture.name), found)]
        else:
            raise DatasetError(f"{source / picture.name}: {found}{SKIP}")
        if len(batch) == settings.batch or (done == len(chunk.pictures) and batch):
            _encode_batch(rows, batch, codec, settings)
            batch = []
            tell(done)


def _encode_batch(rows: Rows, batch: list[tuple[Picture, np.ndarray]], codec: Codec, settings: Settings) -> None:
    pixels = torch.from_numpy(np.stack([p for _, p in batch])).to(codec.vae.device)
    mean, std = codec.encode(pixels.float() / 127.5 - 1)
    stored = torch.cat((mean, std), 1) if settings.kind == "mean+std" else mean
    rows.add(stored.cpu().numpy(), [p.label for p, _ in batch], f"latents of {batch[0][0].name} and those after it")


def _decoded(
    source: Path, chunk: Chunk, settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Pixels (3, size, size) uint8 of each picture in order, or why there are none; two batches are read ahead."""
    waiting: deque[tuple[Picture, Future]] = deque()
    coming = iter(chunk.pictures)
    while True:
        while len(waiting) < 2 * settings.batch and (picture := next(coming, None)):
            waiting.append((picture, pool.submit(_pixels, source / picture.name, settings.size, chunk.mirror)))
        if not waiting:
            return
        picture, future = waiting.popleft()
        yield picture, future.result()


def _pixels(path: Path, size: int, mirror: bool) -> np.ndarray | str:
    try:
        if path.stat().st_size > FILE_BYTES:
            return f"has {path.stat().st_size:,} bytes, that is too many"
        return grids.pixels(grids.centre_crop(grids.read(path.read_bytes()), size), mirror)
    except grids.BrokenImage as error:  # a disk that does not answer is no broken image: OSError stops
        return " ".join(str(error).split())
