"""Rows a second of the loaders, torch and DALI, on latents of 256- and 512-pixel images, against what training takes.

Stored rows are fp16 mean and std, in the page cache. "bytes" are rows as they are stored, on the device; "rows" are what
training gets: with mean + std eps drawn and normalised there. The loaders take turns; before a turn is timed, what was
read ahead while others ran is used up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.results_file import about, save
from bench.harness.timing import quantiles
from cmt_fast.config.schema import Dali, Dit
from cmt_fast.cost import flops
from cmt_fast.cost.estimate import step_us, step_work
from cmt_fast.cost.hardware import CARDS
from cmt_fast.data import dali
from cmt_fast.data.latents import Store
from cmt_fast.data.order import Loader
from cmt_fast.data.rows import Dataset
from cmt_fast.data.shards import Shards, export
from cmt_fast.data.writing import Layout, Writer

SHAPES = {256: (4, 32, 32), 512: (4, 64, 64)}
SIZES = ("B", "L", "XL")


def predicted_us() -> dict[int, dict[str, float]]:
    """Microseconds an image of flow matching on one H100 in bf16, batch 64, by the cost model: predicted, not measured.

    At its fastest, with bias and GELU in the products' epilogues. Of all stages this one takes most rows a second:
    mid-training draws from trajectories, and post-training costs more an image.
    """
    found: dict[int, dict[str, float]] = {}
    for pixels, shape in SHAPES.items():
        for size in SIZES:
            net = flops.network(Dit(size=size), "linear", shape, 1000)
            us = step_us(step_work("FM"), net, CARDS["h100"], "fused+epilogues", "bf16", 64)
            found.setdefault(pixels, {})[net.name] = us
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--n", type=int, default=4096, help="rows of a store; a quarter of them at 512 pixels")
    parser.add_argument("--turns", type=int, default=9, help="turns of each loader")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed in a turn")
    parser.add_argument("--threads", type=int, default=4, help="of DALI's pipeline")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read a store for DALI; 0: leave that out"
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run: 64 rows, 2 turns of 2 steps, no processes")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/<date>-loader.json")


class Bytes:
    """Mixed into a store: rows stay as they are stored."""

    def finish(self, stored: Tensor, index: Tensor, draw: Tensor | None, seed: int) -> Tensor:
        """Nothing is done."""
        return stored


class BytesOfStore(Bytes, Store):
    """A store without arithmetic."""


class BytesOfShards(Bytes, Shards):
    """Shards without arithmetic."""


def write_store(out: Path, n: int, shape: tuple[int, int, int]) -> None:
    """n rows of random mean and std in fp16, 1,000 classes."""
    dice, writer, layout = (
        np.random.default_rng(0),
        Writer(out),
        Layout("mean+std", "float16", (2 * shape[0], *shape[1:])),
    )
    keys = [str(k) for k in range(-(-n // 1024))]
    writer.start()
    for k, key in enumerate(keys):
        with writer.shard(k, layout, key) as into:
            for start in range(k * 1024, min(n, (k + 1) * 1024), 64):
                rows = dice.standard_normal((min(64, n - start), *layout.shape), np.float32)
                rows[:, shape[0] :] = np.abs(rows[:, shape[0] :]) * 0.1
                into.add(rows, [(start + i) % 1000 for i in range(len(rows))], "bench")
    facts = {"flips": False, "class_names": (), "vae": "", "vae_xxh3_128": "", "crop": "", "source": "random"}
    writer.finish(layout, keys, facts)


def loaders(folder: Path, device: torch.device, arguments: argparse.Namespace) -> dict[str, tuple[str, Loader]]:
    """name -> (what it gives, loader), over the store and the shards in a folder."""
    batch, store, shards = arguments.batch, folder / "store", folder / "shards"
    memory = Store(store)
    points = Dataset(torch.cat([memory.rows(i)[0] for i in torch.arange(memory.n).split(256)]), memory.labels, 1000)
    out: dict[str, tuple[str, Loader]] = {"torch, in memory": ("points", Loader(points, 0, device, batch))}
    for what, plain, tar in (("bytes", BytesOfStore, BytesOfShards), ("rows", Store, Shards)):
        out[f"torch, memory-mapped store: {what}"] = (what, Loader(plain(store), 0, device, batch))
        out[f"torch, WebDataset shards: {what}"] = (what, Loader(tar(shards), 0, device, batch))
        if dali.version() is None:
            continue
        config = Dali(threads=arguments.threads)
        feeds = {"external source": (plain(store), config), "WebDataset reader": (tar(shards), config)}
        if arguments.workers:
            workers = Dali(threads=arguments.threads, workers=arguments.workers, prefetch=2 * arguments.workers)
            feeds[f"external source, {arguments.workers} processes"] = (plain(store), workers)
        for name, (data, how) in feeds.items():
            out[f"DALI, {name}: {what}"] = (what, dali.DaliLoader(data, 0, device, batch, how))
    return out


def measure(named: dict[str, tuple[str, Loader]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Rows a second of each turn of each loader."""
    steps = dict.fromkeys(named, 0)
    wait: Callable[[], Any] = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None

    def run(name: str, count: int) -> None:
        loader = named[name][1]
        for _ in range(count):
            position = torch.arange(arguments.batch, device=loader.place) + steps[name] * arguments.batch
            loader.rows(position)
            steps[name] += 1
        wait()

    speeds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(arguments.turns):
        for name in named:
            run(name, 2 * max(Loader.AHEAD, 2 * arguments.workers) + 2)
            begun = time.perf_counter()
            run(name, arguments.steps)
            speeds[name].append(arguments.steps * arguments.batch / (time.perf_counter() - begun))
    return speeds


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the JSON; 1 where DALI is not installed."""
    if arguments.tiny:
        arguments.n, arguments.batch, arguments.turns, arguments.steps, arguments.workers = 64, 8, 2, 2, 0
    device = torch.device(arguments.device)
    results: dict[str, Any] = about(arguments.device) | {"dali": dali.version(), "batch": arguments.batch, "rows": []}
    results |= {"tiny": arguments.tiny, "steps": arguments.steps}
    print(f"{results['device']}, torch {results['torch']}, DALI {results['dali']}, commit {results['commit']}")
    for pixels, shape in SHAPES.items():
        n = arguments.n if pixels == 256 else max(arguments.n // 4, arguments.batch)
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder) / "store", n, shape)
            export(Store(Path(folder) / "store"), Path(folder) / "shards", 1024, 0, lambda done, total: None)
            named = loaders(Path(folder), device, arguments)
            speeds = measure(named, arguments)
            for _, loader in named.values():
                loader.close()
        nbytes = 4 * int(np.prod(shape))  # a row of fp16 mean and std, or one fp32 point: the same
        print(
            f"{pixels} pixels, {nbytes / 1e3:.1f} kB a row, {n:,} rows, batch {arguments.batch}: rows/s p50 (p20-p80), MB/s"
        )
        for name, (what, _) in named.items():
            p20, p50, p80 = quantiles(speeds[name])
            print(f"  {name:45} {p50:10,.0f} ({p20:,.0f}-{p80:,.0f}) {p50 * nbytes / 1e6:10,.0f}", flush=True)
            row = {"pixels": pixels, "loader": name, "gives": what, "p20": p20, "p50": p50, "p80": p80}
            results["rows"].append(row | {"mb_s": p50 * nbytes / 1e6, "bytes": nbytes})
    needs = predicted_us()
    results["needs"] = {"predicted": True, "device": "H100", "us_image": needs}
    print("flow matching takes, PREDICTED, not measured: rows/s of one H100 and of eight")
    for pixels, networks in needs.items():
        print(
            f"  {pixels} pixels: " + ", ".join(f"{k} {1e6 / us:,.0f} and {8e6 / us:,.0f}" for k, us in networks.items())
        )
    if results["dali"] is None:
        print("DALI is not installed: its rows are missing")
    print("written to", save("loader", arguments.device, results, arguments.json))
    return int(results["dali"] is None)
