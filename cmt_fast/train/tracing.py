"""Which layer of a network is the first to give numbers that are not finite, forward, in a tangent and backward.

A step that has failed is passed through the network once more, kernel by kernel, with a look at everything that goes in or
comes out of a layer. It waits for the device at each, so it is for such steps alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from cmt_kernels import Dual
from torch import Tensor, nn

from cmt_fast.engine import Engine
from cmt_fast.runtime import distributed

SAMPLE = 4096  # numbers of a layer's output that are kept to compare two passes


class Found(NamedTuple):
    """What was found. loss: of this rank's rows; forward, backward: where it begins, "" for nowhere."""

    loss: float
    forward: str
    backward: str


class Probe:
    """An engine's network as losses call it, never compiled and never captured, its gradients not the engine's.

    Under ZeRO it is a copy, whole on every rank: hooks of DeepSpeed would send the gradients of a step that is none.
    """

    def __init__(self, engine: Engine) -> None:
        """Every rank must make one together."""
        self.engine, self.stage, self.device = engine, engine.stage, engine.device
        self.own = hasattr(engine, "share_half")  # the local engine: its network is whole
        self.net = engine.net if self.own else engine.copy().requires_grad_(True).train(engine.net.training)
        self.ops = engine._ops if self.own else contextlib.nullcontext

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The forward in the stage's precision."""
        return self.eager(*args, **named)

    def wide(self, *args: Any, **named: Any) -> Any:
        """The forward in fp32."""
        return self.eager(*args, wide=True, **named)

    def eager(self, *args: Any, wide: bool = False, **named: Any) -> Any:
        """As of an engine."""
        if self.own:
            return self.engine.eager(*args, wide=wide, **named)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.products == "bf16" and not wide):
            return self.net(*args, **named)

    def backward(self, loss: Tensor) -> None:
        """The gradient, for its hooks alone."""
        scale = getattr(self.engine, "scale", None)
        with self.ops():
            (loss * scale.scale if scale else loss).backward()

    def close(self) -> None:
        """Leave the engine's gradient as it is between two steps: zero."""
        if self.own:
            self.engine.g.zero_()


def traced(engine: Engine, loss: Callable[[Any], tuple[Tensor, Mapping[str, Tensor]]], held: Mapping[str, Any],
           drawn: Callable[[int], Any]) -> Found:  # fmt: skip
    """The step that `drawn(part)` gives: its first part that is not finite. loss: (probe) -> of what was drawn.

    held: the frozen networks that it calls, by name. Every rank must call it; what it finds is of this rank's rows. All take all
    parts, whatever they find: rollouts, and teachers that are cut over ranks, are calls of all of them.
    """
    probe = Probe(engine)
    looks = {"": probe.net} | {f"{name}: ": net for name, net in held.items() if isinstance(net, nn.Module)}
    first, done, log = 0.0, False, _Log()
    try:
        with _looked_at(looks, log):
            for part in range(engine.grad_accum_steps):
                value, scalars = loss(probe)(drawn(part))
                if done:
                    continue
                first = float(value.detach())
                log.backwards = True
                lost = [k for k, v in {"loss": value, **scalars}.items() if not bool(v.detach().isfinite())]
                if lost and not log.forward:
                    log.forward = f"the {', the '.join(lost)}, after every layer"
                if value.requires_grad and not log.forward:
                    probe.backward(value)
                log.backwards, done = False, bool(log.forward or log.backward)
    finally:
        probe.close()
    return Found(first, log.forward, log.backward)


class _Log:
    """The first of each."""

    def __init__(self) -> None:
        self.forward = self.backward = ""
        self.backwards = False  # what runs forward now is computed again

    def saw(self, x: Any, text: str) -> None:
        if not self.forward and not self.backward and not self.backwards:
            for part, kind in zip(_tensors(x), ("", "the tangent of ") if isinstance(x, Dual) else ("",) * 99):
                if part.is_floating_point() and not bool(part.detach().isfinite().all()):
                    self.forward = f"{kind}{text}"
                    return

    def came_back(self, g: Tensor | None, text: str) -> None:
        if g is not None and not self.backward and not bool(g.isfinite().all()):
            self.backward = text


@contextlib.contextmanager
def _looked_at(nets: Mapping[str, nn.Module], log: _Log) -> Iterator[None]:
    hooks = []
    try:
        for title, net in nets.items():
            for name, module in net.named_modules():
                where = f"{title}{name or 'the network'}"
                hooks += _on(module, where, log)
            hooks += [
                p.register_hook(lambda g, text=f"{title}{name} (its gradient)": log.came_back(g, text))
                for name, p in net.named_parameters() if p.requires_grad
            ]  # fmt: skip
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on(module: nn.Module, where: str, log: _Log) -> list[Any]:
    def before(_: nn.Module, given: tuple) -> None:
        for x in given:
            log.saw(x, f"what goes into {where}")
        for x in _tensors(given):
            _hooked(x, f"{where} (the gradient that it passes on)")

    def after(_: nn.Module, given: tuple, out: Any) -> None:
        for name, p in module.named_parameters(recurse=False):
            log.saw(p, f"the weights {where}.{name}")
        log.saw(out, f"{where}" if not list(module.children()) else f"{where}, between its layers")
        for x in _tensors(out):
            _hooked(x, f"what follows {where} (the gradient that it is given)")

    def _hooked(x: Tensor, text: str) -> None:
        if x.requires_grad and x.grad_fn is not None and not log.backwards:
            x.register_hook(lambda g: log.came_back(g, text))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)


def outputs(net: nn.Module, call: Callable[[], object]) -> dict[str, Tensor]:
    """A sample of what every layer gives in a call, by layer and number of its call. {name: (n,) float64 on the CPU}."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, out: Any) -> None:
        for i, x in enumerate(_tensors(out)):
            flat = x.detach().reshape(-1)
            calls = sum(key.startswith(f"{name}#") for key in kept)
            kept[f"{name}#{calls}.{i}"] = flat[:: max(1, flat.numel() // SAMPLE)].double().cpu()

    hooks = [m.register_forward_hook(lambda _, __, out, name=n: keep(name, out)) for n, m in net.named_modules() if n]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def texts_of_all(text: str) -> list[str]:
    """The text of every rank, in rank order, on all."""
    raw = text.encode()
    most = distributed.largest(len(raw))
    rows = distributed.every_rank([float(b) for b in raw.ljust(most, b"\0")])
    return [bytes(int(b) for b in row).rstrip(b"\0").decode() for row in rows]
