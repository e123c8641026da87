"""Networks whose numbers come later: built without memory, then drawn one parameter after the other.

A rank that holds a share of a network must not hold all of it first. Here a constructor runs on the meta device while the
calls that would have made its numbers are kept. Run again in their order, from the same seed, they give each parameter bit
for bit as the constructor draws it, for any number of ranks and any engine. Two or three calls in a row make a parameter,
so no more than one or two have memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cmt_fast.models.shapes import Shapes

WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}  # in place, as all whose names end in _


class Call(NamedTuple):
    """A call of a constructor, on tensors of the meta device. made: what it gives; touches: numbers of all its tensors."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    made: list[Tensor]
    touches: set[int]


class Tape(TorchFunctionMode):
    """Calls on tensors without memory, in order. Tensors have numbers; a parameter has that of what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []  # by number
        self._by_id: dict[int, int] = {}
        self._by_storage: dict[int, int] = {}
        self._by_view: dict[tuple, int] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), _tensors((args, tuple(kwargs.values())))
        if name == "requires_grad_" or name == "__set__":
            assert name != "__set__" or len(given) < 2, "a constructor that exchanges a tensor's memory"
            return func(*args, **kwargs)
        writes = given and (name in WRITES or (name.endswith("_") and not name.endswith("__")))
        out = (args[0] if args else kwargs["tensor"]) if writes else func(*args, **kwargs)
        made = _tensors(out)
        if made:
            touches = {n for x in (*given, *made) for n in (self.number(x), self._by_storage[_storage(x)])}
            self.calls.append(Call(func, args, kwargs, made, touches))
        return out

    def number(self, x: Tensor) -> int:
        """Of a tensor; a new one for a tensor that is not known."""
        if id(x) not in self._by_id:
            self._alive.append(x)
            self._by_storage.setdefault(_storage(x), len(self.tensors))
            same = _storage(x), x.storage_offset(), x.shape, x.stride()
            if same not in self._by_view:
                self._by_view[same] = len(self.tensors)
                self.tensors.append(x)
            self._by_id[id(x)] = self._by_view[same]
        return self._by_id[id(x)]

    def again(self, call: Call, values: dict[int, Tensor]) -> None:
        """A call with the numbers that its tensors have by now; what it gives is put beside them."""
        kwargs = {key: x for key, x in call.kwargs.items() if key != "device"}
        args, kwargs = self._real((call.args, kwargs), values)
        for x, value in zip(call.made, _tensors(call.function(*args, **kwargs), meta=False)):
            values[self.number(x)] = value

    def _real(self, x: Any, values: dict[int, Tensor]) -> Any:
        if isinstance(x, Tensor) and x.is_meta:
            return values[self.number(x)]
        if isinstance(x, dict):
            return {key: self._real(y, values) for key, y in x.items()}
        return type(x)(self._real(y, values) for y in x) if type(x) in (tuple, list) else x


class Deferred(NamedTuple):
    """A network whose parameters have no memory yet. net: parameters on the meta device, buffers that are computed real.

    named: number on the tape of each parameter and persistent buffer, by name. What is drawn for a buffer comes with
    `numbers`, or with the weights of a parent.
    """

    net: nn.Module
    tape: Tape
    named: dict[str, int]
    seed: int

    @torch.no_grad()
    def numbers(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor on the CPU) of every parameter and persistent buffer, as the constructor would draw it.

        They come in the order in which they are done, and none is held here once it was given.
        """
        names: dict[int, str] = {number: name for name, number in self.named.items()}
        ends = {number: i for i, call in enumerate(self.tape.calls) for number in call.touches}
        values: dict[int, Tensor] = {}
        state = torch.Generator().manual_seed(self.seed).get_state()
        for i, call in enumerate(self.tape.calls):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                self.tape.again(call, values)
                state = torch.get_rng_state()
            for number in [n for n in call.touches if ends[n] == i]:
                value = values.pop(number)
                if number in names:
                    yield names[number], value


def deferred(build: Callable[[], nn.Module], seed: int) -> Deferred:
    """The network that `build` makes under torch.manual_seed(seed); torch's own generator stays as it was."""
    tape = Tape()
    with torch.random.fork_rng(devices=[]), tape, Shapes(), torch.device("meta"):
        net = build()
    named = {name: tape.number(x) for name, x in net.state_dict(keep_vars=True).items() if x.is_meta}
    made = {tape.number(x) for call in tape.calls for x in call.made}
    for name, number in named.items():
        assert number in made, f"{name}: a tensor that no call of the constructor gave"
    assert len(set(named.values())) == len(named), "two parameters that are one"
    _compute_buffers(net, tape)
    return Deferred(net, tape, named, seed)


@torch.no_grad()
def _compute_buffers(net: nn.Module, tape: Tape) -> None:
    """Give the buffers memory by the calls that they depend on, and no others: those that are drawn have yet no meaning."""
    meta = [(m, name, x) for m in net.modules() for name, x in m._buffers.items() if x is not None and x.is_meta]
    needed, calls = {tape.number(x) for _, _, x in meta}, []
    for call in reversed(tape.calls):
        if any(tape.number(x) in needed for x in call.made):
            needed |= call.touches
            calls.append(call)
    values: dict[int, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        for call in reversed(calls):
            tape.again(call, values)
    for module, name, x in meta:
        module._buffers[name] = values[tape.number(x)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(x: Any, meta: bool = True) -> list[Tensor]:
    """All tensors in nested tuples and lists; with `meta` those of the meta device."""
    if isinstance(x, Tensor):
        return [x] if x.is_meta or not meta else []
    return [y for part in x for y in _tensors(part, meta)] if isinstance(x, (tuple, list)) else []
