"""A store of a few random latents, labelled, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cmt_fast.data.latents import Store
from cmt_fast.data.opening import opened
from cmt_fast.data.writing import Layout, Writer


def make_store(
    out: Path,
    n: int = 150,
    shape=(4, 4, 4),
    dtype="float16",
    classes: int = 10,
    shard: int = 64,
    flips: bool = False,
    vae: tuple[str, str] = ("", ""),
    pixels: bool = False,
) -> Store:
    """n rows of mean and std, (8, 4, 4) by default, or of pixels, in shards of `shard` rows. vae: its name and checksum."""
    dice = np.random.default_rng(0)
    mean, std = dice.standard_normal((n, *shape)), np.abs(dice.standard_normal((n, *shape)))
    rows = np.concatenate((mean, std), 1).astype(dtype)
    if pixels:
        rows = dice.integers(256, size=(n, *shape)).astype("uint8")
    labels = [int(y) for y in dice.integers(classes, size=n)] if classes else [None] * n
    labels = labels[: n // 2] * 2 if flips else labels
    layout = Layout("pixels", "uint8", shape) if pixels else Layout("mean+std", dtype, (2 * shape[0], *shape[1:]))
    writer = Writer(out)
    writer.start()
    keys = [str(k) for k in range(-(-n // shard))]
    for k, key in enumerate(keys):
        part = slice(k * shard, (k + 1) * shard)
        with writer.shard(k, layout, key) as into:
            into.add(rows[part], labels[part], "test")
    names = [str(y) for y in range(classes)]
    about = {"vae": vae[0], "vae_xxh3_128": vae[1], "crop": "", "source": "random"}
    writer.finish(layout, keys, {"flips": flips, "class_names": names, **about})
    return opened(out)
