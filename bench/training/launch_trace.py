"""Every kernel that torch would launch, recorded op by op below autograd, with the bytes and FLOPs of its tensors.

`Trace` is a dispatch mode: it sees what autograd, autocast and an optimizer really call, on real tensors or on fake ones,
which have shapes and no memory. Views, metadata and empty tensors launch nothing. An op of ours is one call that launches
KERNELS of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from cmt_kernels.cases import cases_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count

OURS = ("cmt", "cmt_triton")
FILLS = {
    "zeros",
    "zeros_like",
    "new_zeros",
    "zero_",
    "fill_",
    "full",
    "full_like",
    "new_full",
    "ones",
    "ones_like",
    "new_ones",
}
REDUCTIONS = {"sum", "mean", "amax", "max", "linalg_vector_norm"}
JOINS = {"cat", "stack"}
COPIES = {"copy_", "clone", "_to_copy"}
ADDS = {"add", "add_"}
UNREAD = {"zero_", "fill_", "copy_"}  # in place, and what was there is not read
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launch(NamedTuple):
    """A call that launches kernels. part: of the step; kind: what it is; what: whose tensor it makes; dtypes: in->out."""

    part: str
    kind: str
    op: str
    what: str
    dtypes: str
    kernels: int
    nbytes: int
    flops: int


class Sizes(NamedTuple):
    """What tells tensors apart: rows of a batch, of its tangents, tokens (None in a U-Net), the shapes of parameters."""

    batch: int
    tangents: int
    tokens: int | None
    matrices: frozenset[tuple[int, ...]]
    vectors: frozenset[int]

    @classmethod
    def of(cls, net: nn.Module, batch: int, tangents: int, tokens: int | None) -> Sizes:
        """Of a network and a batch."""
        shapes = [tuple(p.shape) for p in net.parameters()]
        matrices = {s for s in shapes if len(s) > 1}
        vectors = frozenset(s[0] for s in shapes if len(s) == 1)
        return cls(batch, tangents, tokens, frozenset(matrices | {s[::-1] for s in matrices}), vectors)

    def what(self, x: Tensor) -> str:
        """Whose tensor this is, by its shape alone: two that share one are not told apart."""
        shape = tuple(x.shape)
        if shape in self.matrices:
            return "weights"
        if math.prod(shape) in self.vectors and max(shape, default=0) == math.prod(shape):
            return "biases"
        first = shape[0] if shape else 0
        if self.tokens is None:
            return "activations" if len(shape) > 2 and first in (self.batch, 2 * self.batch) else "other"
        for name, rows in (("activations", self.batch), ("tangents", self.tangents)):
            if rows and (first == rows * self.tokens or first == rows and len(shape) > 2 and shape[1] == self.tokens):
                return name
        if len(shape) == 2 and first in (self.batch, self.tangents):
            return "conditioning"
        return "images" if len(shape) == 4 else "other"


def two_launches(case: Any) -> int:
    """Kernels of an op that computes rows with a tangent apart from those without."""
    k = getattr(case, "k", None) or 0
    return (k > 0) + (k < case.B)


# kernels that an op of ours launches on a GPU, of the case of its call or for a gradient of the arguments; others: one
KERNELS: dict[str, Callable[[Any, tuple], int]] = {
    "attention": lambda case, args: two_launches(case),
    "attention_backward": lambda case, args: 2,  # queries; keys and values
    "modulated_norm": lambda case, args: two_launches(case),
    "modulated_norm_backward": lambda case, args: 2,  # dx; sums for shift and scale
    "gated_residual_backward": lambda case, args: 2 + (args[3] is not None),  # dbranch; sums for the gate; for the bias
    "gelu_backward": lambda case, args: 1 + (args[2] is not None),  # dx; sums for the bias
    "adamw_ema": lambda case, args: 2,  # the norm; the update
}


def stored_bytes(x: Tensor) -> int:
    """Bytes of a tensor's own elements: of an expanded one those that are stored."""
    return math.prod(n for n, stride in zip(x.shape, x.stride()) if stride or n == 0) * x.element_size()


class Trace(TorchDispatchMode):
    """Records in `launches` what runs inside; `part` names what is running, `unlaunched` counts calls that launch nothing."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.part = sizes, "forward"
        self.launches: list[Launch] = []
        self.unlaunched = 0
        self._case: tuple[str, Any] = ("", None)

    def case(self, op: str, arguments: tuple, named: dict[str, Any]) -> None:
        """The call of an op of ours that comes next."""
        self._case = (op, cases_of(op).case_of(*arguments, **named))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func._schema.name.partition("::")[2]
        mutable = func._schema.is_mutable
        known = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in made if mutable or x.untyped_storage()._cdata not in known]
        if name in EMPTY or not mutable and not any(x.numel() for x in fresh):
            self.unlaunched += 1
        else:
            self.launches.append(self._launch(func, name, args, kwargs, given, out))
        return out

    def _launch(self, func, name: str, args: tuple, kwargs: dict, given: list[Tensor], out: Any) -> Launch:
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        written = [x for x in _mutated(func, args, kwargs)] + made
        first = (written or given)[0]
        read = given[1:] if name in UNREAD else given
        nbytes = sum(map(stored_bytes, _distinct(read))) + sum(map(stored_bytes, _distinct(written)))
        source = next((x for x in read if x.is_floating_point()), first)
        kind, flops, kernels = _kind(name, source, first), 0, 1
        if func.namespace in OURS:
            kind, flops, kernels, nbytes = self._ours(func, name.removeprefix("triton_"), args, nbytes, first)
        elif func._overloadpacket in flop_registry:
            kind = next((k for k in ("attention", "convolution") if k in name), "matmul")
            if name == "addmm":  # its overload with a dtype has that where the formula has the shape of the result
                args, kwargs, source = args[:3], {}, args[1]
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        dtypes = "->".join(str(x.dtype).removeprefix("torch.") for x in (source, first))
        return Launch(self.part, kind, name, self.sizes.what(first), dtypes, kernels, nbytes, flops)

    def _ours(self, func, op: str, args: tuple, nbytes: int, first: Tensor) -> tuple[str, int, int, int]:
        """Kind, FLOPs of matrix products, kernels and bytes: what changes its arguments reads some of them twice."""
        called, case = self._case if self._case[0] == op else ("", None)
        kernels = KERNELS[op](case, args) if op in KERNELS and (called or op.endswith("_backward")) else 1
        flops = 0
        if op == "attention" and called:
            flops = cases_of(op).flops(case)
        elif op == "attention_backward":
            b, t, _, h, d = args[0].shape
            flops = sdpa_backward_flop_count(*[(b, h, t, d)] * 4)
        if called and func._schema.is_mutable:
            nbytes = cases_of(op).nbytes(case, first.element_size())
        return op, flops, kernels, nbytes


def _mutated(func, args: tuple, kwargs: dict) -> Iterable[Tensor]:
    """The tensors that a call changes."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(given) if isinstance(x, Tensor))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each place in memory once."""
    return list({(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): x for x in tensors}.values())


def _kind(name: str, source: Tensor, first: Tensor) -> str:
    """What a call of torch is. source: the first tensor that it reads; first: that it writes."""
    cast = source.is_floating_point() and first.is_floating_point() and source.dtype != first.dtype
    if name in COPIES and cast:
        return "cast up" if source.element_size() < first.element_size() else "cast down"
    for kind, names in (("fill", FILLS), ("reduction", REDUCTIONS), ("cat", JOINS), ("copy", COPIES), ("add", ADDS)):
        if name in names:
            return kind
    return "other"
