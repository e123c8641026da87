"""`cmt data`: make, import, check, describe and show stores of latents and of 8-bit images."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cmt_fast.cli import look
from cmt_fast.cli.parser import Parser
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import autoencoder, classes, encoding, folders, importing, latents, opening
from cmt_fast.data import shards as webdataset
from cmt_fast.data.writing import ROWS
from cmt_fast.runtime import distributed, machine, progress, signals

DTYPES = {"fp16": "float16", "fp32": "float32"}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    actions = p.add_subparsers(dest="action", required=True, parser_class=Parser, metavar="ACTION")

    def action(name: str, call: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        a = actions.add_parser(name, help=text, description=text)
        a.set_defaults(call=call)
        return a

    text = "encode a folder of images, or one folder a class, to a store of latents or --pixels; rerun to resume"
    _encoding(action("encode", encode, text))
    _importing(action("import", convert, "latents or images as other projects store them, into a store"))
    p = action(
        "shards",
        shards,
        "write a store as WebDataset shards (tar archives in random order), which can be trained on as well",
    )
    p.add_argument("store", type=Path, metavar="STORE", help="the store's folder")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    p.add_argument("--shard-rows", type=int, default=ROWS, help=f"rows in a file (default: {ROWS:,})")
    p.add_argument("--seed", type=int, default=0, help="of the order of rows")

    text = "one picture of the first samples of training, with their classes and the histogram of their values"
    look.add_arguments(action("look", look.look, text))

    for name, call, text in (
        ("verify", verify, "check every row of a store against its checksum"),
        ("stats", stats, "mean and standard deviation of each channel, rows of each class, read from all rows"),
    ):
        action(name, call, text).add_argument("store", type=Path, metavar="STORE", help="the store's folder")


def _encoding(p: argparse.ArgumentParser) -> None:
    """The arguments of `cmt data encode`."""
    p.add_argument("source", type=Path, metavar="IMAGES", help="a folder of images, or of one folder a class")
    p.add_argument("out", type=Path, metavar="OUT", help="the store, a new folder")
    p.add_argument(
        "--vae",
        metavar="FOLDER_OR_ID",
        help="an AutoencoderKL or AutoencoderRAE of diffusers: the store holds its latents",
    )
    p.add_argument(
        "--pixels", action="store_true", help="no autoencoder: the store holds 8-bit images, C x SIZE x SIZE"
    )
    p.add_argument("--channels", type=int, choices=(3, 1), help="with --pixels: 3, colour (default), or 1, grey")
    p.add_argument(
        "--download", action="store_true", help="fetch the autoencoder from the hub if there is no local copy"
    )
    p.add_argument("--size", type=int, required=True, help="side of the square cut from the middle, such as 64 or 512")
    p.add_argument("--flip", action="store_true", help="encode the mirror images too (twice the rows)")
    p.add_argument(
        "--any-class", action="store_true", help="every folder is a class: train and val, and empty ones too"
    )
    p.add_argument(
        "--statistics",
        choices=("mean+std", "mean"),
        help="of each latent (default: mean+std, mean of an AutoencoderRAE)",
    )
    p.add_argument("--dtype", choices=tuple(DTYPES), help="of the store (default: fp16; pixels are 8-bit)")
    p.add_argument(
        "--precision", choices=tuple(PRECISIONS), help="of the autoencoder (default: fp16 on a GPU, fp32 on a CPU)"
    )
    p.add_argument(
        "--broken",
        choices=("fail", "skip"),
        default="fail",
        help="skip: leave out images that cannot be read and links that lead nowhere, and list them in OUT/broken.tsv",
    )
    p.add_argument("--batch", type=int, default=16, help="images at a time (default: 16)")
    p.add_argument("--workers", type=int, default=4, help="threads that decode images (default: 4)")
    p.add_argument("--shard-rows", type=int, default=ROWS, help=f"rows in a file (default: {ROWS:,})")
    p.add_argument("--device", default="auto", help="cpu, cuda or auto (default: a GPU where there is one)")


def _importing(p: argparse.ArgumentParser) -> None:
    """The arguments of `cmt data import`."""
    p.add_argument("source", type=Path, metavar="FILE_OR_FOLDER", help="what the other project wrote")
    p.add_argument("out", type=Path, metavar="OUT", help="the store, a new folder")
    p.add_argument("--format", required=True, choices=importing.FORMATS, help="whose: see docs/data.md")
    p.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp16", help="of the store (default: fp16; 8-bit images stay)"
    )
    p.add_argument("--statistics", choices=("mean", "mean+std"), default="mean", help="format npy: what the arrays are")
    p.add_argument("--flip", action="store_true", help="format lightningdit: keep the mirror images too")
    p.add_argument(
        "--factor",
        type=float,
        default=1.0,
        help="factor that the latents were multiplied by (DiT: 0.18215); it is divided out",
    )
    p.add_argument("--unchecked", action="store_true", help="take numbers whatever their range and standard deviation")
    p.add_argument("--shard-rows", type=int, default=ROWS, help=f"rows in a file (default: {ROWS:,})")


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Inside: the function to call with how many are done, and of how many."""
    before = 0
    with progress.phase(title) as advance:

        def tell(done: int, total: int) -> None:
            nonlocal before
            advance(done - before, total)
            before = done

        yield tell


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        if distributed.rank() == 0:
            print("cmt: stopped; rerun the same command to resume from the last whole shard", file=sys.stderr)
        raise SystemExit(signals.code_of(error)) from None


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not at least 1")


def encode(args: argparse.Namespace) -> None:
    _positive(args, "size", "batch", "workers", "shard_rows")
    if not args.source.is_dir():
        raise ConfigError(f"IMAGES: {str(args.source)!r} is not a folder")
    _pixels_or_latents(args)
    found = folders.listing(args.source, args.any_class)
    device = machine.device(args.device)
    distributed.start(device)
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    vae, settings = None, encoding.Settings(args.size, "pixels", "uint8", batch=args.batch, channels=args.channels or 3)
    if not args.pixels:
        vae = autoencoder.Codec.open(args.vae, device, dtype=PRECISIONS[precision], download=args.download)
        if args.statistics == "mean+std" and not vae.spreads:
            raise ConfigError(
                f"--statistics: latents of {args.vae!r} have no standard deviation of their own; take mean"
            )
        kind, dtype = args.statistics or ("mean+std" if vae.spreads else "mean"), DTYPES[args.dtype or "fp16"]
        settings = encoding.Settings(args.size, kind, dtype, precision, args.batch, args.flip)
    with _progress("encode") as tell, _stoppable():
        index = encoding.encode(
            found, args.out, vae, settings, shard_rows=args.shard_rows, skip_broken=args.broken == "skip",
            workers=args.workers, tell=tell,
        )  # fmt: skip
    if index:
        _about(args.out, index)
        if found.told():
            progress.say(f"{args.source}: {found.told()}")


def _pixels_or_latents(args: argparse.Namespace) -> None:
    """Raises ConfigError unless one of --vae and --pixels is given, for options of the other."""
    if bool(args.vae) == args.pixels:
        what = "both are given" if args.pixels else "neither is given"
        raise ConfigError(f"--vae, --pixels: {what}; --vae FOLDER_OR_ID stores latents, --pixels the images themselves")
    if args.pixels and args.flip:
        raise ConfigError(
            "--flip: is for latents; of --pixels the recipe's key data.flip=true makes mirror images when read"
        )
    for name in ("statistics", "dtype", "precision", "download") if args.pixels else ("channels",):
        if getattr(args, name):
            raise ConfigError(f"--{name}: is for {'latents' if args.pixels else '--pixels'} only")


def convert(args: argparse.Namespace) -> None:
    _positive(args, "shard_rows")
    if not 1e-6 <= args.factor <= 1e6 or (args.factor != 1 and args.format == "edm"):
        raise ConfigError(f"--factor: {args.factor} is not valid; it must be positive, and is for latents only")
    dtype = DTYPES[args.dtype]
    settings = importing.Settings(args.format, dtype, args.statistics, args.flip, args.factor, args.unchecked)
    notes: list[str] = []
    with _progress("import") as tell:
        index = importing.convert(
            args.source, args.out, settings, shard_rows=args.shard_rows, tell=tell, note=notes.append
        )
    _about(args.out, index)
    for note in notes:
        progress.say(f"{args.source}: {note}")


def shards(args: argparse.Namespace) -> None:
    _positive(args, "shard_rows")
    store = opening.opened(args.store, latents.read_index(args.store).flips)
    with _progress("shards") as tell:
        webdataset.export(store, args.out, args.shard_rows, args.seed, tell)
    _about(args.out, latents.read_index(args.out))


def _about(out: Path, index: latents.Index) -> None:
    size = index.rows * index.stride
    progress.say(
        f"{out}: {index.rows:,} rows of {index.kind} {index.dtype} {' x '.join(map(str, index.shape))}, "
        f"{index.classes} class{'es' * (index.classes != 1)}, {len(index.shards)} shard{'s' * (len(index.shards) > 1)}, "
        f"{size / 1e6:,.1f} MB"
    )
    if index.class_ids:
        ids = ", ".join(map(str, index.class_ids[:8])) + " ..." * (index.classes > 8)
        progress.say(
            f"{out}: the source's labels {ids} are the classes 0 to {index.classes - 1}; their numbers are kept"
        )
    if index.rows == 1:
        progress.say(
            f"{out}: one row is no data set to be judged by; to learn one image by heart, store two copies of it"
        )
    broken = out / "broken.tsv"
    if broken.is_file():
        lines = broken.read_text("utf-8").splitlines()
        progress.say(
            f"{broken}: {len(lines)} image{'s' * (len(lines) > 1)} left out, the first: {lines[0].replace(chr(9), ': ')}"
        )


def verify(args: argparse.Namespace) -> None:
    store = opening.opened(args.store)
    done = 0
    with _progress("verify") as tell:

        def told(rows: int) -> None:
            nonlocal done
            tell(done := done + rows, store.index.rows)

        bad = store.verify(told)
    for line in bad[:20]:
        print(f"cmt: {line}", file=sys.stderr)
    if bad:
        raise ConfigError(f"{args.store}: {len(bad)} of {store.index.rows:,} rows are damaged")
    progress.say(f"{args.store}: sound, {store.index.rows:,} rows in {len(store.index.shards)} shards")


def stats(args: argparse.Namespace) -> None:
    store = opening.opened(args.store)
    index, found = store.index, store.statistics()
    _about(args.store, index)
    progress.say(
        f"source {index.source or 'unknown'}; crop {index.crop or 'unknown'}; mirror images {'yes' if index.flips else 'no'}"
    )
    if index.kind != "pixels":
        progress.say(f"autoencoder {index.vae or 'unknown'} {index.vae_xxh3_128[:12]}")
    progress.say(f"smallest {found.low:.4g}, largest {found.high:.4g}")
    for c, (mean, std) in enumerate(zip(found.mean, found.std)):
        progress.say(
            f"channel {c}: mean {mean:.4f} (index {index.mean[c]:.4f}), std {std:.4f} (index {index.std[c]:.4f})"
        )
    progress.say(classes.line(store))
    if note := classes.gaps(store):
        progress.say(f"note: {note}")
    if found.counts:
        counts = found.counts
        for k, (name, n) in enumerate(zip(classes.names(store)[:20], counts)):
            progress.say(f"  {k:>4} {'' if name == str(k) else name} {n:,}")
        if len(counts) > 20:
            progress.say(f"  and {len(counts) - 20} more")
