"""The training step as one CUDA graph: forward, loss and backward of one part of a step, recorded once and replayed.

An eager step of a large network is issued kernel by kernel, and a processor may take longer to issue it than a GPU to compute
it. A replay is one launch. Outside of the graph stay what the host decides anew at every step: the draw of a batch (its noise
and times have the step's number in them) and the optimizer (its learning rate and betas). What is drawn is copied into
tensors that stay where they are, gradients are added to the engine's flat buffer, and every part of a step of the same shapes
is the same graph.

Python runs while the graph is recorded and never again, so a number that the host put in is there for good: the graph of a
loss that reads the step's number computes one step's for ever, and nothing fails. A loss is therefore given nothing of the
step but tensors, and the graph is proven before it is used. The first pass is eager, and its batch is kept. At the second
both batches go through the eager pass, twice, and through a replay: loss, scalars and gradient must agree to the bit, or
where eager passes differ among themselves (kernels that add atomically) within twice what they do. At the first pass of the
next step they are compared again, when whatever the host counts has moved on. Nothing of the stage changes by it.

The memory of the activations belongs to the graph and is lent to nobody, so `release` gives it back, before an evaluation;
the next pass records anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine.local import LocalEngine
from cmt_fast.runtime import distributed, progress
from cmt_fast.runtime.cuda_graphs import aside, captured, reason

Loss = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
MOST = 4  # different shapes of a batch; a stage whose batches have more is not captured
PIECE = 1 << 24  # numbers of a gradient that are compared at once


def obstacle(engine: str, device: torch.device) -> str | None:
    """Why no step of this engine ("local", "zero") on this device can be a graph; None where one may be."""
    if engine != "local":
        return f"the engine is {engine}, whose step is DeepSpeed's; only 'local' can be captured"
    if device.type != "cuda":
        return f"it needs a CUDA device, and this run's is {device.type}"
    return None


def eager(engine: Any, loss: Loss, drawn: Any) -> dict[str, Tensor]:
    """One part of a step, kernel by kernel: its gradient is added to the engine's. Returns {"loss": (), scalars...}.

    Where the loss or a scalar is not finite the gradient is NaN: it is the one thing that all ranks come to know.
    """
    value, scalars = loss(drawn)
    sound = torch.stack([x.detach().isfinite() for x in (value, *scalars.values())]).all()
    engine.backward(value * torch.ones_like(value).masked_fill_(~sound, torch.nan))
    return {"loss": value.detach(), **scalars}


class StepGraph:
    """graph(drawn) -> {"loss": (), scalars...}: one part of a step, its gradient added to the engine's.

    drawn: a tree of tensors, None and names. What it returns is good until the next call. Where the stage's `cuda_graph` is
    "auto" and a step cannot be captured, one line says why and it is eager from then on.
    """

    def __init__(
        self,
        engine: Any,
        loss: Loss,
        name: str,
        tell: Callable[[str], None],
        waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        """loss: what was drawn -> the scalar to differentiate and those to log; name: the stage's; tell: prints a line;
        waiting: whether passes are eager for now, as under a profiler.

        Raises ConfigError, here or in a call, where the stage asks for a graph and there cannot be one.
        """
        self.engine, self.name, self.tell, self.waiting = engine, name, tell, waiting
        self.eager = functools.partial(eager, engine, loss)
        self.shapes: list[_Shape] = []
        self.off = engine.stage.cuda_graph is False
        why = obstacle("local" if isinstance(engine, LocalEngine) else "zero", engine.device)
        if why and not self.off:
            self._refuse(why, quiet=engine.device.type == "cpu")

    def __call__(self, drawn: Any) -> dict[str, Tensor]:
        """One part of a step. Raises ConfigError where the stage asks for a graph and its step cannot be one."""
        if self.off or self.waiting():
            return self.eager(drawn)
        key = _Key.of(drawn)
        shape = next((s for s in self.shapes if s.key == key), None)
        if shape is None:
            self._pass_over(key)
            if len(self.shapes) == MOST:
                self._refuse(f"its batches have more than {MOST} shapes")
            else:
                self.shapes.append(_Shape(key, drawn))
            return self.eager(drawn)
        self._ready(shape, drawn)
        return self.eager(drawn) if self.off else shape(drawn)

    def release(self) -> None:
        """Give the memory of the activations back to the device; the next pass records anew."""
        self._drop(self.shapes)

    def _drop(self, shapes: list[_Shape]) -> None:
        held = any(shape.replay for shape in shapes)
        for shape in shapes:
            shape.drop()
        if held and self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass_over(self, key: _Key) -> None:
        """Let go what differs from this one by names alone: they change with the part of a schedule, which does not return."""
        gone = [s for s in self.shapes if (s.key.tree, s.key.tensors) == (key.tree, key.tensors)]
        self.shapes = [s for s in self.shapes if s not in gone]
        self._drop(gone)

    def _ready(self, shape: _Shape, drawn: Any) -> None:
        """Record the graph where there is none, and prove it where that is due. The gradient is left as it was."""
        proof, step, proofs, found = _Proof(self.engine, self.eager), self.engine.step_count, shape.proofs, None
        if shape.replay and (proofs == 2 or shape.step == step):
            return
        try:
            with progress.phase("recording the step as a CUDA graph and proving it", quiet=True):
                if proofs == 0:
                    found, proofs = proof.two_batches(shape, drawn), 1
                elif shape.replay:
                    found, proofs = proof.moved_on(shape, drawn), 2
                if not shape.replay and not found:
                    shape.record(self.eager)
        except RuntimeError as error:
            found = reason(error)
        if distributed.largest(int(bool(found))) and not found:  # all are graphs or none is
            found = "it cannot be one in another process"
        if found:
            return self._refuse(found)
        if shape.proofs == 0:
            self.tell(f"{self.name:>8} the step is one CUDA graph, equal to the eager one on two batches")
        shape.proofs, shape.step = proofs, step

    def _refuse(self, why: str, quiet: bool = False) -> None:
        self.off = True
        self.release()
        self.shapes.clear()
        if self.engine.stage.cuda_graph is True:
            raise ConfigError(f"the step cannot be a CUDA graph: {why}", f"{self.name}.cuda_graph")
        if not quiet:
            self.tell(f"{self.name:>8} no CUDA graph of the step: {why}")


class _Key(NamedTuple):
    """What batches that share a graph have in common: their tree, what in it is no tensor, shapes and dtypes."""

    tree: TreeSpec
    others: list[Any]
    tensors: list[tuple[torch.Size, torch.dtype]]

    @classmethod
    def of(cls, drawn: Any) -> _Key:
        leaves, tree = tree_flatten(drawn)
        numbers = [x for x in leaves if not isinstance(x, Tensor | str | None)]
        assert not numbers, f"{numbers[0]!r} in a drawn batch would be a constant of its graph; make it a tensor"
        others = [Tensor if isinstance(x, Tensor) else x for x in leaves]
        return cls(tree, others, [(x.shape, x.dtype) for x in _tensors(drawn)])


class _Shape:
    """The graph of batches with one key: inputs that stay where they are, and what a replay leaves in its outputs.

    proofs: how many it has passed, of two; step: at which it was recorded.
    """

    def __init__(self, key: _Key, drawn: Any) -> None:
        """drawn: the first batch, of which a copy stands in the inputs."""
        self.key, self.proofs, self.step = key, 0, -1
        self.inputs: Any = _copied(drawn)
        self.outputs: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None

    def record(self, call: Callable[[Any], dict[str, Tensor]]) -> None:
        """Capture `call` of the inputs. Raises RuntimeError where that cannot be."""
        self.drop()
        replay = captured(lambda: self.outputs.update(call(self.inputs)))
        self.replay = replay

    def __call__(self, drawn: Any) -> dict[str, Tensor]:
        """Replay it of another batch."""
        assert self.replay is not None
        for mine, x in zip(_tensors(self.inputs), _tensors(drawn), strict=True):
            mine.copy_(x)
        self.replay()
        return self.outputs

    def drop(self) -> None:
        """Let the graph and its memory go."""
        self.replay, self.outputs = None, {}


class _Pass(NamedTuple):
    """What a pass has given: loss and scalars, and its gradient (P,) in the host's memory."""

    values: dict[str, float]
    gradient: Tensor


class _Proof:
    """Compares replays with eager passes under the present weights; the engine's gradient comes out as it went in.

    An eager pass and the graph are never on the device together.
    """

    def __init__(self, engine: Any, call: Callable[[Any], dict[str, Tensor]]) -> None:
        self.engine, self.call = engine, call

    def two_batches(self, shape: _Shape, drawn: Any) -> str | None:
        """Record the shape, whose inputs hold a batch, and replay it of that one and of `drawn`. What differs, or None.

        Raises RuntimeError where it cannot be recorded.
        """
        batches = _copied(shape.inputs), drawn
        with self._aside():
            known = [self._known(batch) for batch in batches]
            shape.record(self.call)
            found = [self._beyond(self._of(shape, batch), *ours) for batch, ours in zip(batches, known)]
        return next(filter(None, found), None)

    def moved_on(self, shape: _Shape, drawn: Any) -> str | None:
        """Replay what an earlier step has recorded, and drop it. What differs from this step's eager pass, or None."""
        with self._aside():
            found = self._of(shape, drawn)
            shape.drop()
            return self._beyond(found, *self._known(drawn))

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        g = self.engine.g
        before = _held(g) if g.any() else None
        try:
            yield
        finally:
            g.zero_() if before is None else g.copy_(before)

    def _known(self, drawn: Any) -> tuple[_Pass, dict[str, float]]:
        """An eager pass, and how far others are from it: one, or three where that one differs."""
        first = self._of(self.call, drawn)
        apart = [self._apart(self._of(self.call, drawn), first)]
        if any(apart[0].values()):
            apart += [self._apart(self._of(self.call, drawn), first) for _ in range(2)]
        return first, {k: max(a[k] for a in apart) for k in apart[0]}

    def _of(self, call: Callable[[Any], dict[str, Tensor]], drawn: Any) -> _Pass:
        out: dict[str, Tensor] = {}
        self.engine.g.zero_()
        aside(lambda: out.update(call(drawn)), self.engine.device)
        return _Pass({k: float(v) for k, v in out.items()}, _held(self.engine.g))

    def _apart(self, one: _Pass, other: _Pass) -> dict[str, float]:
        """How far two passes are from one another: in each value, and the norm between their gradients."""
        there = self.engine.device
        pieces = zip(one.gradient.split(PIECE), other.gradient.split(PIECE))
        squares = [float(_difference(a.to(there), b.to(there)).square().sum()) for a, b in pieces]
        values = {k: float(_difference(*map(torch.tensor, (v, other.values[k])))) for k, v in one.values.items()}
        return {k: abs(v) for k, v in values.items()} | {"gradient": sum(squares) ** 0.5}

    def _beyond(self, replayed: _Pass, eager: _Pass, apart: dict[str, float]) -> str | None:
        """Where a replay is further from an eager pass than eager passes are from one another."""
        for what, size in self._apart(replayed, eager).items():
            # where eager passes differ, a number may be rounded once more than they happened to
            once = torch.finfo(torch.float32).eps * abs(eager.values.get(what, 0.0)) if any(apart.values()) else 0.0
            if not size <= 2 * apart[what] + once:
                return f"its {what} is {size:.1e} from the eager one's (eager ones from each other: {apart[what]:.1e})"
        return None


def _held(g: Tensor) -> Tensor:
    """A copy of a gradient in the host's memory."""
    return g.cpu() if g.is_cuda else g.clone()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in float64; 0 where both are the same infinity or none is a number: a loss that has diverged is told elsewhere."""
    same = (a == b) | (a.isnan() & b.isnan())
    return (a.double() - b.double()).masked_fill(same, 0)


def _tensors(drawn: Any) -> list[Tensor]:
    return [x for x in tree_leaves(drawn) if isinstance(x, Tensor)]


def _copied(drawn: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, drawn)
