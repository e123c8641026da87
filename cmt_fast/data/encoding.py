"""`cmt data encode`: a folder of images, class folder by class folder, into a store: of latents, through an autoencoder, or
of 8-bit pixels.

Images are decoded by threads (PIL works outside the interpreter's lock) and encoded in batches that never cross a
shard; shards are dealt over ranks. So a shard's bytes depend on its images and settings alone, not on what was
killed before or on how many ranks there are.
"""

from __future__ import annotations

import contextlib
import functools
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Codec
from cmt_fast.data.folders import NOWHERE, Listing, Picture, named, text
from cmt_fast.data.latents import Index
from cmt_fast.data.writing import Layout, Rows, Writer, key_of
from cmt_fast.render import grids
from cmt_fast.runtime import distributed

CROP = "centre, boxes then bicubic"
FILE_BYTES = 256 << 20
SKIP = " (--broken skip leaves such images out)"


class Chunk(NamedTuple):
    """The pictures of one shard, and whether their mirror images are its rows."""

    pictures: list[Picture]
    mirror: bool


class Settings(NamedTuple):
    """What a store's rows depend on besides the images and the autoencoder. channels: of kind "pixels", 3 or 1 (grey)."""

    size: int
    kind: str = "mean+std"
    dtype: str = "float16"
    precision: str = "fp32"
    batch: int = 16
    flip: bool = False
    channels: int = 3


def encode(
    found: Listing,
    out: Path,
    codec: Codec | None,
    settings: Settings,
    *,
    shard_rows: int,
    skip_broken: bool = False,
    workers: int = 4,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Index | None:
    """Write OUT, or go on with it. tell(images done, all of them), of this rank. Returns the index on rank 0.

    codec: None for kind "pixels". Raises DatasetError for an OUT that cannot be used, and for a broken image or a link that
    leads nowhere unless those are skipped.
    """
    source, images = found.source, found.pictures
    if found.dead and not skip_broken:
        raise DatasetError(f"{source}: has links that lead nowhere: {named(found.dead)}{SKIP}")
    if codec and settings.size % codec.factor:
        raise DatasetError(f"--size: {settings.size} is no multiple of {codec.factor}, the autoencoder's factor")
    chunks = [images[i : i + shard_rows] for i in range(0, len(images), shard_rows)]
    work = [Chunk(chunk, mirror) for mirror in ((False, True) if settings.flip else (False,)) for chunk in chunks]
    digest = codec.digest if codec else ""
    keys = [
        key_of(settings, digest, CROP, [(text(p.name), *p[1:]) for p in pictures], mirror) for pictures, mirror in work
    ]
    writer, rank = Writer(out), distributed.rank()
    if rank == 0:
        writer.start()
    distributed.barrier()
    layout = _layout(codec, settings)
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
            "flips": settings.flip, "class_names": found.classes, "vae": codec.name if codec else "", "vae_xxh3_128": digest,
            "crop": f"{CROP}, {settings.size}", "source": f"images {text(source.resolve().name)}",
        }  # fmt: skip
        return writer.finish(layout, keys, facts)


def _layout(codec: Codec | None, settings: Settings) -> Layout:
    if codec is None:
        return Layout("pixels", "uint8", (settings.channels, settings.size, settings.size))
    side, both = settings.size // codec.factor, settings.kind == "mean+std"
    return Layout(settings.kind, settings.dtype, (codec.channels * (2 if both else 1), side, side))


def _told(tell: Callable[[int, int], None], before: int, total: int, n: int) -> None:
    tell(before + n, total)


def _fill(
    rows: Rows, source: Path, chunk: Chunk, codec: Codec | None, settings: Settings, skip_broken: bool,
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


def _encode_batch(rows: Rows, batch: list[tuple[Picture, np.ndarray]], codec: Codec | None, settings: Settings) -> None:
    stored, labels = np.stack([p for _, p in batch]), [p.label for p, _ in batch]
    if codec:
        mean, std = codec.encode(torch.from_numpy(stored).to(codec.vae.device).float() / 127.5 - 1)
        stored = (torch.cat((mean, std), 1) if settings.kind == "mean+std" else mean).cpu().numpy()
    what = "latents" if codec else "pixels"
    rows.add(stored, labels, f"{what} of {text(batch[0][0].name)} and those after it")


def _decoded(
    source: Path, chunk: Chunk, settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Pixels (C, size, size) uint8 of each picture in order, or why there are none; two batches are read ahead."""
    waiting: deque[tuple[Picture, Future]] = deque()
    coming = iter(chunk.pictures)
    while True:
        while len(waiting) < 2 * settings.batch and (picture := next(coming, None)):
            waiting.append((picture, pool.submit(_pixels, source / picture.name, settings, chunk.mirror)))
        if not waiting:
            return
        picture, future = waiting.popleft()
        yield picture, future.result()


def _pixels(path: Path, settings: Settings, mirror: bool) -> np.ndarray | str:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return "is no file"
        if about.st_size > FILE_BYTES:
            return f"has {about.st_size:,} bytes, that is too many"
        image = grids.centre_crop(grids.read(path.read_bytes()), settings.size)
        return grids.pixels(image.convert("L") if settings.channels == 1 else image, mirror)
    except grids.BrokenImage as error:
        return " ".join(str(error).split())
    except OSError as error:  # a disk that does not answer is no broken image
        if error.errno in NOWHERE and path.is_symlink():
            return "is a link that leads nowhere"
        raise
