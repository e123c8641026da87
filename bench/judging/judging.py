"""Moments, Fréchet distance, and precision and recall of 50,000 x 2,048 made-up features: CPU seconds and peak memory, as it
was (slow.py) beside as it is.

Each part runs in a process of its own, of one thread: seconds are of the processor, so a busy machine does not count, and the
peak is what the kernel saw (VmHWM). What both ways hold before they begin, the features, is told apart. The features have a few
dimensions that matter and noise in all, as those of a network do; both ways get the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from bench.harness import results_file
from bench.judging import killed, slow
from cmt_fast.evaluation import distances, neighbours
from cmt_fast.evaluation.distances import Moments, Stream
from cmt_fast.run import samples
from cmt_fast.storage import npz_blocks

FILE = "judging.json"
BATCH, LATENT, GROUPS = 64, 48, 10
PARTS = ("moments", "frechet", "neighbours", "samples")
KILLED = 2000  # samples of the commands that are killed
SIDE = 64  # pixels of a sample that is written
WAYS = ("before", "after")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--n", type=int, default=50_000, help="samples, and rows that they are compared with")
    p.add_argument("--features", type=int, default=2048)
    p.add_argument("--ranks", type=int, default=2, help="precision and recall are measured shared by so many, too")
    p.add_argument("--only", choices=(*PARTS, "killed"), help="one part; the others keep the numbers that the file has")
    p.add_argument("--way", choices=WAYS, help="one way; the other keeps its numbers")
    p.add_argument("--out", type=Path, default=results_file.ROOT / "bench/results/cpu" / FILE)
    p.add_argument("--measure", nargs=2, metavar=("PART", "WAY"), help=argparse.SUPPRESS)  # in a process of its own


def rows(seed: int, scale: float, first: int, last: int, features: int) -> Tensor:
    """Rows first to last - 1 of a made-up set: (last - first, features) float32, the same however they are cut by BATCH."""
    g = torch.Generator().manual_seed(0)
    onto = torch.randn(LATENT, features, generator=g) / LATENT**0.5
    out = []
    for start in range(first, last, BATCH):
        g.manual_seed(seed * 1_000_003 + start)
        z = torch.randn(BATCH, LATENT, generator=g) * scale
        out.append((z @ onto + 0.1 * torch.randn(BATCH, features, generator=g) + 0.5)[: last - start])
    return torch.cat(out)


def whole(seed: int, scale: float, n: int, features: int) -> Tensor:
    """A whole set, (n, features); what makes it holds a piece at a time."""
    out = torch.empty(n, features)
    for start in range(0, n, 16 * BATCH):
        out[start : start + 16 * BATCH] = rows(seed, scale, start, min(n, start + 16 * BATCH), features)
    return out


def made_up(seed: int, scale: float, features: int) -> Moments:
    """Moments of a set with the spectrum of `rows`, without drawing it."""
    g = torch.Generator().manual_seed(0)
    onto = torch.randn(LATENT, features, generator=g).double() / LATENT**0.5
    g.manual_seed(seed)
    spread = scale**2 * onto.T @ onto + torch.diag(0.01 + 0.001 * torch.rand(features, generator=g).double())
    return Moments(torch.full((features,), 0.5).double(), spread)


def moments(way: str, n: int, features: int) -> Callable[[], Any]:
    """All samples, and each of GROUPS groups of them, as intervals need; batches come as a network makes them."""
    batches = whole(1, 0.9, min(n, 4096), features).split(BATCH)  # the same few over and over
    count = -(-n // BATCH)

    def before() -> float:
        every, groups = slow.Stream(), [slow.Stream() for _ in range(GROUPS)]
        for i in range(count):
            every.add(batches[i % len(batches)])
            groups[i * GROUPS // count].add(batches[i % len(batches)])
        return float(every.moments().covariance.trace())

    def after() -> float:
        groups = [Stream() for _ in range(GROUPS)]
        for i in range(count):
            g = i * GROUPS // count
            groups[g].add(batches[i % len(batches)])
            groups[g - 1].fold()  # as `Measures` does: of earlier groups no row waits
        return float(Stream.joined([g.shared() for g in groups]).moments().covariance.trace())

    return before if way == "before" else after


def frechet(way: str, n: int, features: int) -> Callable[[], Any]:
    """One judged set: its distance, and those without each of GROUPS groups; the reference was met before."""
    known, sets = made_up(1, 1.0, features), [made_up(seed, 0.9, features) for seed in range(2, 3 + GROUPS)]

    def before() -> list[float]:
        first = slow.frechet(known, sets[0])  # who counts samples took a root, and who makes intervals another one
        distance = distances.Against(known)
        return [first, *(distance(m) for m in sets)][1:]

    kept = distances.Against(known) if way == "after" else None
    return before if way == "before" else lambda: [kept(m) for m in sets] if kept else None


def near(way: str, n: int, features: int) -> Callable[[], Any]:
    """Precision and recall of n samples against n rows."""
    real, made = whole(1, 1.0, n, features), whole(2, 0.9, n, features)
    call = slow.precision_recall if way == "before" else neighbours.precision_recall
    return lambda: call(real, made)


def written(way: str, n: int, features: int) -> Callable[[], Any]:
    """n made-up images of SIDE x SIDE pixels in an .npz: all at once, and block by block as `cmt sample --out` does."""
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "x.npz"
    image = lambda i: torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    request = samples.Request(n, batch=BATCH)

    def before() -> str:
        images = torch.cat([torch.stack([image(i) for i in rows]) for rows in request.blocks])
        np.savez(out, images=images.numpy(), labels=np.zeros(n, np.int64))
        return _arrays(out)

    def after() -> str:
        for rows in request.blocks:
            with npz_blocks.block(Path(folder.name) / f"{rows.start:09d}.npy", len(rows)) as put:
                put(0, torch.stack([image(i) for i in rows]).numpy())
        blocks = [(Path(folder.name) / f"{rows.start:09d}.npy", len(rows)) for rows in request.blocks]
        npz_blocks.join(blocks, out, "images", {"labels": np.zeros(n, np.int64)})
        return _arrays(out)

    def ending(call: Callable[[], str]) -> Callable[[], str]:
        return lambda: (call(), folder.cleanup())[0]

    return ending(before if way == "before" else after)


def _arrays(path: Path) -> str:
    """The checksum of the array of images, read a few bytes at a time."""
    state = xxhash.xxh3_128()
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        np.lib.format.read_magic(file)
        while part := file.read(1 << 20):
            state.update(part)
    return state.hexdigest()


def measured(part: str, way: str, n: int, features: int) -> dict[str, Any]:
    """Seconds of the processor and memory of one part, here."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    call = {"moments": moments, "frechet": frechet, "neighbours": near, "samples": written}[part](way, n, features)
    held, clock = _status("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    figures = call()
    used = time.process_time() - clock
    return {"part": part, "way": way, "n": n, "features": features, "cpu_s": used, "held_bytes": held,
            "peak_bytes": _status("VmHWM"), "figures": figures}  # fmt: skip


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def launched(part: str, way: str, arguments: argparse.Namespace, ranks: int = 1) -> dict[str, Any]:
    """`measured` in processes of its own; of several the dearest seconds and peak."""
    command = [sys.executable, "-m", "bench", "judging", "--n", str(arguments.n), "--features", str(arguments.features)]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            out = Path(folder) / f"{rank}.json"
            group = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
            env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **group}
            processes.append(subprocess.Popen([*command, "--measure", part, way, "--out", str(out)], env=env))
        if any([p.wait() for p in processes]):
            raise RuntimeError(f"{part}, {way}: a process failed")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    first = found[0]
    assert all(f["figures"] == first["figures"] for f in found)
    return {
        **first,
        "ranks": ranks,
        **{key: max(f[key] for f in found) for key in ("cpu_s", "held_bytes", "peak_bytes")},
    }


def run(arguments: argparse.Namespace) -> int:
    if arguments.measure:
        part, way = arguments.measure
        arguments.out.write_text(json.dumps(measured(part, way, arguments.n, arguments.features)))
        return 0
    data = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"rows": []}
    if arguments.only in (None, "killed"):
        data["killed"] = killed.measured(KILLED)
        print(json.dumps(data["killed"]), flush=True)
        results_file.write_json(arguments.out, data)
    known = data["rows"]
    for part in PARTS:
        for way in WAYS:
            for ranks in (1, arguments.ranks) if (part, way) == ("neighbours", "after") else (1,):
                if arguments.only in (None, part) and arguments.way in (None, way):
                    row = launched(part, way, arguments, ranks)
                    same = ("part", "way", "ranks", "n", "features")
                    known = [k for k in known if any(k[key] != row[key] for key in same)] + [row]
                    peak = (row["peak_bytes"] - row["held_bytes"]) / 1e9
                    print(
                        f"{part} {way} on {ranks}: {row['cpu_s']:.1f} CPU s, {peak:.2f} GB beside what it is given",
                        flush=True,
                    )
                    about = {**results_file.about("cpu"), "threads": 1}
                    results_file.write_json(arguments.out, {**data, **about, "rows": known})
    return 0
