"""The DALI loader: the rows of the torch loader, to the bit, read and moved to the device by NVIDIA DALI.

Rows travel as they are stored, through a pipeline that runs ahead of training; their arithmetic, mean + std eps and the
normalisation, is the data set's `finish` on the device. A latent store is read by an external source, WebDataset shards
by DALI's own reader, which gets the order of rows as index files written for it. Either way a pipeline is started at
a position, so all there is to resume is the step: DALI's own checkpoints are not used, since they go on from a wrong
place, without an error, when the batch or the number of shards is another.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dali
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.order import Loader, Order
from cmt_fast.data.rows import Dataset, Rows
from cmt_fast.data.shards import HEADER, Shards

PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
SPAN, EPOCHS = 2**16, 8  # rows and epochs of a pipeline over shards; half-way the next is made, with its index files


def version() -> str | None:
    """DALI's version as its package says it, None where it is not installed; nothing is imported."""
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def check(data: Rows) -> None:
    """Raises ConfigError when DALI is not installed, or the data are in memory, where there is nothing to feed."""
    if isinstance(data, Dataset):
        raise ConfigError("loader.kind: 'dali' feeds data on disk, these are in memory; valid is torch")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise ConfigError(
            "loader.kind: 'dali' needs NVIDIA DALI, which is not installed: "
            "pip install nvidia-dali-cuda130, or nvidia-dali-cuda120 beside a torch for CUDA 12"
        ) from None


class DaliLoader(Loader):
    """As Loader, for data on disk. The step asked for last is kept: a guard before training asks for it twice."""

    def __init__(self, data: Rows, seed: int, device: torch.device, stride: int, config: Dali) -> None:
        """stride: rows a step over all ranks, how far positions advance. Raises ConfigError as `check` does."""
        check(data)
        self.data, self.seed, self.device, self.stride, self.config = data, seed, device, stride, config
        self.order, self.stored = Order(data, seed), True
        self._feed: _Store | _Shards | None = None
        self._position, self._held = torch.empty(0, dtype=torch.int64), None
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._coming: tuple[Tensor, Future] | None = None

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """position: (B,) int64, counted from the start of training -> x (B, ...), labels (B,) or None.

        Positions that do not follow on those before start the pipeline anew. Raises DatasetError when rows are damaged.
        """
        position = position.cpu()
        if self._held is None or not torch.equal(position, self._position):
            feed = self._feed if torch.equal(position, self._position + self.stride) else None
            self._feed = self._held = None  # an error leaves nothing behind
            if feed is None or feed.left == 0:
                feed = self._next(position)
            self._held, self._position, self._feed = feed.next(), position, feed
            if self._coming is None and 2 * feed.left < feed.steps:
                after = position + (feed.left + 1) * self.stride
                self._coming = after, self._thread.submit(self._start, after)
        index, epoch = self.order(position)
        labels = None if self.data.labels is None else self.data.labels[index].to(self.device)
        return self.data.finish(self._held, index.to(self.device), epoch.to(self.device), self.seed), labels

    def _start(self, position: Tensor) -> _Store | _Shards:
        kind = _Shards if isinstance(self.data, Shards) else _Store
        return kind(Order(self.data, self.seed), position, self.stride, self.device, self.config)

    def _next(self, position: Tensor) -> _Store | _Shards:
        coming, self._coming = self._coming, None
        return coming[1].result() if coming and torch.equal(coming[0], position) else self._start(position)

    def close(self) -> None:
        """End the pipeline, its threads and processes."""
        self._thread.shutdown(cancel_futures=True)
        self._feed = self._held = self._coming = None


class _Read:
    """What the external source calls: step `iteration` -> its rows as they are stored, a function of its number."""

    def __init__(self, order: Order, first: Tensor, stride: int, split: bool) -> None:
        self.order, self.first, self.stride, self.split = order, first, stride, split

    def __call__(self, iteration: int) -> Any:
        index, _ = self.order(self.first + iteration * self.stride)
        rows = self.order.data.read(index).numpy()
        return list(rows) if self.split else rows  # processes hand over lists


class _Feed:
    """A pipeline of so many steps from one position on; left: those it still has. Its order is its own, as it is ahead."""

    steps = left = 2**62

    def __init__(self, batch: int, device: torch.device, config: Dali) -> None:
        from nvidia.dali import Pipeline

        self.gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.gpu else None
        self.pipeline = Pipeline(
            batch_size=batch,
            num_threads=config.threads,
            device_id=(device.index or 0) if self.gpu else None,
            prefetch_queue_depth=config.prefetch,
            py_num_workers=max(config.workers, 1),
            py_start_method="spawn",  # a process that holds CUDA or threads must not be forked
        )

    def own(self, part: Any) -> Tensor:
        """A tensor of our own with what DALI has put out, where it has put it: its buffers are used again."""
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        if self.stream is None:
            return to_torch_tensor(part.as_tensor(), copy=True)
        with torch.cuda.stream(self.stream):  # waits for the copy alone, not for the steps that are under way
            out = to_torch_tensor(part.as_tensor(), copy=True)
        self.stream.synchronize()
        out.record_stream(torch.cuda.current_stream(out.device))
        return out


class _Store(_Feed):
    """Rows of a latent store, gathered by a callback, here or in processes of DALI's."""

    def __init__(self, order: Order, position: Tensor, stride: int, device: torch.device, config: Dali) -> None:
        from nvidia.dali import fn

        super().__init__(len(position), device, config)
        parallel = config.workers > 0
        ahead = {"prefetch_queue_depth": config.prefetch} if parallel else {}
        read = _Read(order, position, stride, parallel)
        with self.pipeline:
            rows = fn.external_source(source=read, batch=True, parallel=parallel, **ahead)
            self.pipeline.set_outputs(rows.gpu() if self.gpu else rows)
        self.pipeline.build()

    def next(self) -> Tensor:
        """The stored rows of the next step."""
        try:
            (rows,) = self.pipeline.run()
        except DatasetError:
            raise
        except Exception as error:  # processes raise a class of DALI's with a traceback as its text
            if "DatasetError" not in str(error):
                raise
            raise DatasetError(_reason(error)) from None
        return self.own(rows)


class _Shards(_Feed):
    """Rows of WebDataset shards, read by DALI in the order that index files name. Bytes are checked before they leave."""

    def __init__(self, order: Order, position: Tensor, stride: int, device: torch.device, config: Dali) -> None:
        from nvidia.dali import fn, types

        super().__init__(len(position), device, config)
        data = order.data
        assert isinstance(data, Shards)
        self.data = data
        self.steps = self.left = max(1, min(SPAN // len(position), EPOCHS * -(-data.n // stride)))
        index, epoch = order((position + torch.arange(self.left)[:, None] * stride).flatten())
        self.coming = list(index.split(len(position)))
        with tempfile.TemporaryDirectory(prefix="cmt-index-") as folder:
            archives, indices = _write_indices(data, index, epoch, Path(folder))
            with self.pipeline:
                files = fn.readers.webdataset(
                    paths=archives,
                    index_paths=indices,
                    ext=["npy"],
                    missing_component_behavior="error",
                    prefetch_queue_depth=config.prefetch,
                )
                files = files[0] if isinstance(files, (list, tuple)) else files
                dtype = {"float16": types.FLOAT16, "float32": types.FLOAT, "uint8": types.UINT8}[data.index.dtype]
                rows = fn.reinterpret(files[HEADER:], dtype=dtype, shape=list(data.index.shape))
                self.pipeline.set_outputs(rows, *([rows.gpu()] if self.gpu else []))
            self._guarded(self.pipeline.build)

    def next(self) -> Tensor:
        """The stored rows of the next step."""
        outputs = self._guarded(self.pipeline.run)
        self.data.check_rows(self.coming.pop(0), outputs[0].as_array())
        self.left = len(self.coming)
        return self.own(outputs[-1])

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            self.data.check()  # names the archive when it is not what it was
            raise DatasetError(f"{self.data.folder}: DALI cannot read it ({_reason(error)})") from None


def _write_indices(data: Shards, index: Tensor, epoch: Tensor, folder: Path) -> tuple[list[str], list[str]]:
    """Index files that make DALI's reader give the rows `index` (N,) in this order; archives and index files, in order.

    Rows that follow one another in the same archive and epoch share an index file; an archive may come up again.
    """
    shard = data.shard_of(index)
    begins = torch.ones(len(index), dtype=torch.bool)
    begins[1:] = (shard[1:] != shard[:-1]) | (epoch[1:] != epoch[:-1])
    edges = [*begins.nonzero()[:, 0].tolist(), len(index)]
    archives, indices = [], []
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        path = folder / f"{i}.idx"
        path.write_text(data.index_file(index[a:b]), "ascii")
        archives.append(str(data.archive(int(shard[a]))))
        indices.append(str(path))
    return archives, indices


def _reason(error: Exception) -> str:
    """The one line that says why, out of DALI's report: what an operator encountered, or the end of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines:
        return lines[lines.index("encountered:") + 1]
    return next((line.partition("Error: ")[2] for line in lines if "DatasetError: " in line), lines[-1])
