"""What a network keeps of a row for its backward, and what a forward without gradient holds at once: counted, not run.

The network is built of fake tensors (fakes.py), which have shapes, storages and autograd but no numbers, and called as a step
calls it, under the same autocast. Every tensor that autograd saves is seen by a hook, each storage once. So the count is
of this machine's ops: where the native library is built, its ops save less than plain torch. A GPU's other ops
save a little more or less; what a step there was measured to save stands in bench/results beside this count.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmt_fast import models
from cmt_fast.config.schema import Model
from cmt_fast.cost.fakes import Fakes
from cmt_fast.models.shapes import LightMode
from cmt_fast.models.vgg import LatentVgg, PixelVgg

# rows of the call that is counted: more than the bytes of any network's weights, so that bytes // ROWS are of a row and
# bytes % ROWS of what does not grow with rows. Nothing is allocated
ROWS = 10**11


class Kept(NamedTuple):
    """Bytes that a forward keeps: `row` of each row, `fixed` whatever their number (weights as they are multiplied with)."""

    row: float
    fixed: float

    def bytes(self, rows: float) -> float:
        """What `rows` rows keep."""
        return self.fixed + rows * self.row


def of_model(model: Model, path: str, shape: tuple[int, ...], classes: int, bf16: bool) -> Kept:
    """Of a recipe's network in training. Raises ValueError where model and rows do not fit."""
    return _of_model(model, path, tuple(shape), classes, bf16)


def of_features(distance: str, shape: tuple[int, ...], width: int, bf16: bool = False) -> Kept:
    """Of the frozen network behind a perceptual distance, which keeps what the image's gradient needs."""
    return _of_features(distance, tuple(shape), width, bf16)


def working(model: Model, path: str, shape: tuple[int, ...], classes: int, bf16: bool) -> float:
    """Bytes a row that a forward without gradient holds at its fullest."""
    model = dataclasses.replace(model, checkpoint_activations=False) if _again(model) else model
    return _forward(model, path, tuple(shape), classes, bf16)[0]


@functools.lru_cache(maxsize=64)
def _of_model(model: Model, path: str, shape: tuple[int, ...], classes: int, bf16: bool) -> Kept:
    run = _call(shape, classes)
    kept = _kept(_built(model, path, shape, classes), run, bf16)
    if not _again(model):
        return kept
    plain = dataclasses.replace(model, checkpoint_activations=False)
    largest = _kept(_built(plain, path, shape, classes), run, bf16, by_block=True)
    return Kept(kept.row + largest.row, kept.fixed + largest.fixed)  # a block runs again, and then keeps its own


@functools.lru_cache(maxsize=4)
def _built(model: Model, path: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network of fakes, which counts in both precisions use."""
    with fake():
        return models.build(model, path, 0.5, shape, classes)


@functools.lru_cache(maxsize=16)
def _of_features(distance: str, shape: tuple[int, ...], width: int, bf16: bool) -> Kept:
    make = PixelVgg if distance == "lpips" else lambda: LatentVgg(shape[0], 1000, width)
    sides = (3, *shape[1:]) if distance == "lpips" else shape
    image = lambda: torch.empty(ROWS, *sides, requires_grad=True)
    with fake():
        net = make().requires_grad_(False)
    return _kept(net, lambda net: net.slices(image()), bf16)


def calls(model: Model, path: str, shape: tuple[int, ...], classes: int, bf16: bool) -> int:
    """Calls of ops that compute, views aside, which a forward without gradient makes: what its host has to issue."""
    model = dataclasses.replace(model, checkpoint_activations=False) if _again(model) else model
    return _forward(model, path, tuple(shape), classes, bf16)[1]


@functools.lru_cache(maxsize=64)
def _forward(model: Model, path: str, shape: tuple[int, ...], classes: int, bf16: bool) -> tuple[float, int]:
    """Bytes a row at the fullest, and ops that are no views, of a forward without gradient."""
    with fake(), torch.no_grad():
        net = models.fold(models.build(model, path, 0.5, shape, classes))
        with _casts(bf16), _Live() as seen:
            out = _call(shape, classes)(net)
            del out
        return seen.most // ROWS, seen.ops


def _again(model: Model) -> bool:
    return bool(getattr(model, "checkpoint_activations", False))


def _call(shape: tuple[int, ...], classes: int) -> Callable[[nn.Module], Any]:
    """A call of a network as a step makes it, with ROWS rows."""

    def call(net: nn.Module) -> Any:
        t = torch.ones(ROWS)
        return net(torch.empty(ROWS, *shape), t, t, torch.zeros(ROWS, dtype=torch.int64) if classes else None)

    return call


def _casts(bf16: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def fake() -> Iterator[None]:
    """Inside, tensors are fakes on the CPU, and torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]), Fakes():
        yield


def _kept(net: nn.Module, run: Callable[[Any], Any], bf16: bool, by_block: bool = False) -> Kept:
    """What autograd keeps of run(net), parameters and buffers aside; by_block: of the block that keeps most, alone."""
    seen: dict[int, tuple[str, Tensor]] = {}
    where = [""]
    with fake():
        own = {_key(p) for p in (*net.parameters(), *net.buffers())}
        hooks = []
        for name, block in _blocks(net) if by_block else []:
            hooks.append(block.register_forward_pre_hook(lambda *_, name=name: where.__setitem__(0, name)))
            hooks.append(block.register_forward_hook(lambda *_: where.__setitem__(0, "")))

        def pack(x: Tensor) -> Tensor:
            if _key(x) not in own:
                seen.setdefault(_key(x), (where[0], x.detach()))  # kept alive, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _casts(bf16):
            out = run(net)
            del out
        for hook in hooks:
            hook.remove()
        sizes: dict[str, int] = {}
        for name, x in seen.values():
            sizes[name] = sizes.get(name, 0) + x.untyped_storage().nbytes()
    total = max((n for name, n in sizes.items() if name), default=0) if by_block else sum(sizes.values())
    return Kept(*map(float, (total // ROWS, total % ROWS)))


def _blocks(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that run again where activations are not kept."""
    inner = next((m for m in net.modules() if hasattr(m, "checkpoint_activations")), net)
    lists = [getattr(inner, name) for name in ("blocks", "encoder", "decoder") if hasattr(inner, name)]
    return [(f"{i}.{name}", m) for i, held in enumerate(lists) for name, m in held.named_children()]


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Live(LightMode):
    """Bytes of the storages that the ops inside make, while they live; the most at any time; ops that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.ops = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += not func.is_view
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
