"""`cmt data import`: latents and images that other projects have stored, into a store of ours.

| format       | what it is                                                                                   |
| edm2         | zip of mean ++ std arrays (2 C, h, w) and dataset.json, as EDM2's dataset tool writes          |
| edm          | zip of PNG images of one size and dataset.json (CIFAR-10, ImageNet-64, FFHQ): 8-bit images     |
| lightningdit | safetensors shards of `latents`, `latents_flip`, `labels`                                      |
| npy          | one array a file: folders *features and *labels of numbered files (DiT), class folders, or flat |

Zip, uncompressed tar or folder, read in place. Anything that is wrong is one DatasetError, and nothing stays of OUT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmt_fast.data import values
from cmt_fast.data.archives import Archive, DatasetError, array, parse
from cmt_fast.data.classes import MOST
from cmt_fast.data.folders import debris, named
from cmt_fast.data.latents import Index
from cmt_fast.data.writing import Layout, Writer, key_of
from cmt_fast.render import grids

FORMATS = ("edm2", "edm", "lightningdit", "npy")
PART = 64  # rows read at a time
SAMPLE = 4  # parts that are looked at before anything is written
MOST_PIXELS = 1 << 22  # of an image in an archive


class Foreign(NamedTuple):
    """What is about to be imported: row count, classes by name if they have names, and rows start:stop on demand.

    part: (start, stop) -> rows (B, ...) and labels; facts: enters the keys of shards, so another source is not mixed in.
    """

    n: int
    part: Callable[[int, int], tuple[np.ndarray, list[int | None], str]]
    facts: Any
    class_names: tuple[str, ...] = ()
    flips: bool = False
    left_out: tuple[str, ...] = ()


class Settings(NamedTuple):
    """How files are read: their format; the store's dtype; kind: what arrays of format npy are; flip: keep LightningDiT's
    mirror images.

    factor: what the arrays were multiplied with when they were written; they are divided by it, so that an autoencoder
    decodes them. unchecked: numbers are taken whatever their range and standard deviation.
    """

    format: str
    dtype: str
    kind: str = "mean"
    flip: bool = False
    factor: float = 1.0
    unchecked: bool = False


def convert(
    source: Path,
    out: Path,
    settings: Settings,
    *,
    shard_rows: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Index:
    """Write OUT from `source`. tell(rows done, all of them); note: told what is left out.

    Raises DatasetError; what was begun of OUT is removed then.
    """
    format, dtype, kind, flip, factor, _ = settings
    writer = Writer(out)
    if format == "edm":
        kind, dtype = "pixels", "uint8"
    kind = {"edm2": "mean+std", "lightningdit": "mean"}.get(format, kind)
    found = _lightningdit(source, flip) if format == "lightningdit" else _members(source, format)
    if flip and not found.flips:
        raise DatasetError(f"--flip: format {format} holds no mirror images")
    layout = _layout(found, kind, dtype, settings.unchecked)
    if kind != "pixels" and not settings.unchecked:
        _check(found, kind, factor, str(source), note)
    shards = [(i, min(i + shard_rows, found.n)) for i in range(0, found.n, shard_rows)]
    keys = [key_of(format, layout, found.facts, factor, span) for span in shards]
    name = re.sub(r"[^\w. -]", "_", source.resolve().name)
    writer.start()
    with writer.lock():
        try:
            for k, (start, stop) in enumerate(shards):
                if writer.record(k, keys[k]) is None:
                    with writer.shard(k, layout, keys[k]) as rows:
                        for i in range(start, stop, PART):
                            x, labels, where = found.part(i, min(i + PART, stop))
                            rows.add(x if factor == 1 else x / np.float32(factor), labels, where)
                            tell(min(i + PART, stop), found.n)
                tell(stop, found.n)
            if found.left_out:
                note(f"left out {len(found.left_out):,} files that systems leave behind: {named(list(found.left_out))}")
            return writer.finish(
                layout,
                keys,
                {
                    "flips": found.flips, "class_names": found.class_names, "vae": "", "vae_xxh3_128": "",
                    "crop": "", "source": f"{format} {name}",
                },
            )  # fmt: skip
        except DatasetError:
            writer.abandon()
            raise


def _layout(found: Foreign, kind: str, dtype: str, unchecked: bool) -> Layout:
    """What the rows are, by the first. Raises DatasetError where they are no rows of this kind."""
    first, _, where = found.part(0, 1)
    if first.ndim != 4 or max(first.shape[1:]) > 1 << 20 or first[0].nbytes > 1 << 26:
        raise DatasetError(f"{where}: has the shape {first.shape[1:]}, a row is (C, h, w)")
    if values.last_axis(first.shape[1:]) and not unchecked:
        raise DatasetError(
            f"{where}: has the shape {first.shape[1:]}, that is (h, w, C), channels last; a row is (C, h, w), "
            "array.transpose(2, 0, 1)"
        )
    if (first.dtype == np.uint8) != (kind == "pixels"):
        raise DatasetError(f"{where}: holds {first.dtype}, which is not what rows of kind {kind} are")
    if kind == "mean+std" and first.shape[1] % 2:
        raise DatasetError(f"{where}: has {first.shape[1]} channels, mean and std are an even number")
    return Layout(kind, dtype, tuple(first.shape[1:]))


def _check(found: Foreign, kind: str, factor: float, source: str, note: Callable[[str], None]) -> None:
    """Raises DatasetError where a sample of the rows, evenly spread, says that they cannot be latents as they are.

    What may be right or wrong is noted.
    """
    starts = sorted({k * max(0, found.n - PART) // (SAMPLE - 1) for k in range(SAMPLE)})

    def parts() -> Iterator[np.ndarray]:
        for start in starts:
            x, _, where = found.part(start, min(start + PART, found.n))
            x = x.astype(np.float32) / np.float32(factor)
            if not np.isfinite(x).all():
                raise DatasetError(f"{where}: has numbers that are not finite")
            yield x[:, : x.shape[1] // 2] if kind == "mean+std" else x

    spread = values.spread(parts())
    if wrong := values.flat(spread, 1e-6) or values.raw(spread):
        after = "" if factor == 1 else f" after --factor {factor:g}"
        raise DatasetError(
            f"{source}: has {spread.text()}{after}: {wrong}; --factor divides a factor out, images are for `cmt data encode "
            f"--pixels`, and --unchecked takes the numbers as they are"
        )
    if factor == 1 and spread.all < 1.5:
        note(
            f"{spread.text()}: if these were multiplied by an autoencoder's factor (DiT: 0.18215), import them with --factor; "
            "without it they train as well, but that autoencoder cannot decode them"
        )


# ----------------------------------------------------------------------------- archives and folders of single files


def _members(source: Path, format: str) -> Foreign:
    archive = Archive(source)
    suffixes = {"edm2": (".npy",), "npy": (".npy",), "edm": (".png", ".npy")}[format]
    every = [n for n in archive.names if n.lower().endswith(suffixes)]
    names = [n for n in every if not any(map(debris, n.split("/")))]
    left_out = tuple(sorted(set(every) - set(names)))
    if format == "npy":
        names, labels, classes = _npy_labels(archive, names)
    else:
        labels, classes = _json_labels(archive, names), ()
    if not names:
        raise DatasetError(f"{source}: holds no {' or '.join(suffixes)} file")

    def part(start: int, stop: int) -> tuple[np.ndarray, list[int | None], str]:
        rows = [_row(archive, n) for n in names[start:stop]]
        for name, row in zip(names[start:stop], rows):
            if row.shape != rows[0].shape or row.dtype != rows[0].dtype:
                raise DatasetError(
                    f"{source}: {name!r} is {row.dtype} {row.shape}, others {rows[0].dtype} {rows[0].shape}"
                )
        return np.stack(rows), [labels[n] for n in names[start:stop]], f"{source}: {names[start]!r} and those after it"

    stat = source.stat()
    about = (
        len(names),
        stat.st_size,
        stat.st_mtime_ns,
        [archive.size(n) for n in names[:: max(1, len(names) // 1000)]],
    )
    return Foreign(len(names), part, about, classes, left_out=left_out)


def _row(archive: Archive, name: str) -> np.ndarray:
    """One row, (C, h, w): an array less leading axes of length 1, or an image."""
    where, data = f"{archive.path}: {name!r}", archive.read(name)
    if not name.lower().endswith(".npy"):
        try:
            return grids.pixels(grids.read(data, MOST_PIXELS))
        except grids.BrokenImage as error:
            raise DatasetError(f"{where} {error}") from None
    row = array(data, where)
    while row.ndim > 3 and len(row) == 1:
        row = row[0]
    if row.ndim != 3 or not row.size:
        raise DatasetError(f"{where}: has the shape {row.shape}, a row is (C, h, w)")
    if row.dtype.kind != "f" and row.dtype != np.uint8:
        raise DatasetError(f"{where}: holds {row.dtype}, rows are floats or uint8")
    return row


def _json_labels(archive: Archive, names: list[str]) -> dict[str, int | None]:
    """Labels of dataset.json, `{"labels": [[name, class], ...]}`: for all rows or, if it is missing or null, none.

    The file may lie in any folder, as in an archive that was unpacked and packed again; the names in it begin there.
    """
    found = [n for n in archive.names if n.rpartition("/")[2] == "dataset.json" and not any(map(debris, n.split("/")))]
    if not found:
        return dict.fromkeys(names)
    if len(found) > 1:
        raise DatasetError(
            f"{archive.path}: has {len(found):,} files dataset.json ({named(found)}); import one data set"
        )
    where, folder = f"{archive.path}: {found[0]!r}", found[0].removesuffix("dataset.json")
    body = parse(archive.read(found[0]), where)
    if not isinstance(body, dict):
        raise DatasetError(f"{where}: is no mapping")
    pairs = body.get("labels")
    if pairs is None or (isinstance(pairs, list) and pairs and all(p is None for p in pairs)):
        return dict.fromkeys(names)
    if not isinstance(pairs, list):
        raise DatasetError(f"{where}: its labels are no list")
    out: dict[str, int | None] = {}
    for p in pairs:
        if not (isinstance(p, list) and len(p) == 2 and isinstance(p[0], str)) or folder + p[0] in out:
            raise DatasetError(f"{where}: {str(p)[:60]!r} is no [name, class], or appears twice")
        out[folder + p[0]] = _class(p[1], where)
    wrong = sorted(set(names) ^ set(out))
    if wrong:
        raise DatasetError(f"{where}: {wrong[0][:80]!r} is only {'there' if wrong[0] in out else 'in the archive'}")
    return out


def _class(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise DatasetError(f"{where}: {str(value)[:40]!r} is no class number, a whole number from 0 to {MOST - 1}")
    return value


def _npy_labels(archive: Archive, names: list[str]) -> tuple[list[str], dict[str, int | None], tuple[str, ...]]:
    """Rows in order, their labels, names of classes."""
    folders = sorted({n.rpartition("/")[0] for n in names})
    features = [f for f in folders if f.endswith("features")]
    if features:
        targets = [f for f in folders if f.endswith("labels")]
        if len(features) > 1 or len(targets) > 1 or len(folders) != len(features) + len(targets):
            raise DatasetError(f"{archive.path}: has the folders {folders[:4]}, not one *features and one *labels")
        rows = sorted((n for n in names if n.startswith(features[0] + "/")), key=_number)
        if not targets:
            return rows, dict.fromkeys(rows), ()
        labels: dict[str, int | None] = {}
        for name in rows:
            target = f"{targets[0]}/{name.rpartition('/')[2]}"
            found = array(archive.read(target), f"{archive.path}: {target!r}")
            if found.size != 1 or found.dtype.kind not in "iu":
                raise DatasetError(f"{archive.path}: {target!r} is {found.dtype} {found.shape}, not one class")
            labels[name] = _class(int(found.reshape(-1)[0]), f"{archive.path}: {target!r}")
        if len(names) != 2 * len(rows):
            raise DatasetError(f"{archive.path}: has {len(names) - len(rows)} labels for {len(rows)} features")
        return rows, labels, ()
    if folders in ([], [""]):
        return sorted(names, key=_number), dict.fromkeys(names), ()
    if "" in folders:
        raise DatasetError(f"{archive.path}: has arrays in class folders and beside them")
    classes = sorted({n.split("/")[0] for n in names})
    return names, {n: classes.index(n.split("/")[0]) for n in names}, tuple(classes)


def _number(name: str) -> tuple[int, str]:
    """10.npy after 9.npy."""
    stem = name.rpartition("/")[2].removesuffix(".npy")
    return (int(stem), name) if stem.isascii() and stem.isdigit() and len(stem) < 18 else (1 << 62, name)


# --------------------------------------------------------------------------------------------------- LightningDiT


def _lightningdit(source: Path, flip: bool) -> Foreign:
    """Shards in the order of their names; their mirror images, if wanted, as the second half."""
    from safetensors import SafetensorError, safe_open

    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if not files:
        raise DatasetError(f"{source}: is not a folder of .safetensors files")
    starts, labelled, stats = [0], [], []
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise DatasetError(f"{file}: is a link or a device")
        try:
            with safe_open(file, "numpy") as opened:
                shapes = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise DatasetError(f"{file}: is no sound safetensors file ({error})") from None
        main = shapes.get("latents", ())
        if len(main) != 4 or not main[0] or (flip and shapes.get("latents_flip") != main):
            raise DatasetError(f"{file}: holds {str(shapes)[:120]}, not latents (N, C, h, w){' twice' if flip else ''}")
        if shapes.get("labels", main[:1]) not in (main[:1], (main[0], 1)):
            raise DatasetError(f"{file}: has labels {shapes['labels']} for {main[0]} latents")
        labelled.append("labels" in shapes)
        starts.append(starts[-1] + main[0])
        stats.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    if len(set(labelled)) > 1:
        raise DatasetError(f"{source}: some files have labels and some have none")
    half = starts[-1]

    def pieces(start: int, stop: int) -> Iterator[tuple[np.ndarray, list[int | None]]]:
        while start < stop:
            row = start % half
            k = int(np.searchsorted(starts, row, "right")) - 1
            a, b = row - starts[k], min(starts[k + 1] - starts[k], row - starts[k] + stop - start)
            try:
                with safe_open(files[k], "numpy") as opened:
                    x = opened.get_slice("latents" if start < half else "latents_flip")[a:b]
                    y = opened.get_slice("labels")[a:b].reshape(-1) if labelled[0] else None
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise DatasetError(f"{files[k]}: cannot be read ({error})") from None
            if x.dtype.kind != "f" or (y is not None and y.dtype.kind not in "iu"):
                raise DatasetError(f"{files[k]}: holds {x.dtype} latents with {None if y is None else y.dtype} labels")
            yield x, [None] * len(x) if y is None else [_class(int(v), str(files[k])) for v in y]
            start += len(x)

    def part(start: int, stop: int) -> tuple[np.ndarray, list[int | None], str]:
        parts = list(pieces(start, stop))
        shapes = {x.shape[1:] for x, _ in parts}
        if len(shapes) > 1:
            raise DatasetError(f"{source}: files hold latents of different shapes {sorted(shapes)}")
        return np.concatenate([x for x, _ in parts]), [y for _, ys in parts for y in ys], str(source)

    return Foreign(half * (2 if flip else 1), part, stats, (), flip)
