"""A stage under torch.compile: one block for all, or the whole network, and the guard that runs before the first step.

What is compiled is the module's forward, values and tangents, with its backward, in graphs of static shapes; noise, loss
and optimizer stay as they are. A network of blocks that are alike compiles one of them, with the parameters as arguments,
and runs them all by it: seconds whatever the depth, where a whole XL takes minutes. Compilers have dropped tangents without
a word, so a compiled stage does not begin until its network has given, on the stage's own first batch, what the eager one
gives.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from cmt_kernels import Dual, use
from cmt_kernels import graph as graph_passes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cmt_fast.runtime import progress

NAMES = ("value", "tangent")


class CompileError(RuntimeError):
    """The network does not compile, or computes something else when compiled: one line."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


def compile_network(net: nn.Module, backend: str | Callable = "inductor") -> Callable:
    """The module's forward without graph breaks, in static shapes, compiled anew for each kind of call.

    A part that names its method `repeated` (DiT) has blocks that are alike: one graph runs each of them, and what is around
    them stays eager. Any other network is one graph. Under Inductor, what activation checkpointing computes again is values
    alone (`cmt_kernels.graph`). Where torch's limit of kinds is reached a call raises; none falls back to eager.
    """
    options = {"post_grad_custom_pre_pass": _dead_tangents()} if backend == "inductor" else None
    compiled = lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=backend, options=options)
    owner = next((m for m in net.modules() if hasattr(m, "repeated")), None)
    if owner is None:
        return compiled(net)
    name = owner.repeated
    block = compiled(_with_own_code(getattr(type(owner), name)))

    def run(*arguments: Any) -> Any:
        return block(owner, *map(_even, arguments))

    def forward(*arguments: Any, **named: Any) -> Any:
        vars(owner)[name] = run  # for this call alone: `net` itself stays eager
        try:
            return net(*arguments, **named)
        finally:
            del vars(owner)[name]

    return forward


def more_kinds(n: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's limit of kinds of calls is n higher: for a stage that is known to make more of them as it goes on."""
    return torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit + n)


def _with_own_code(f: Callable) -> Callable:
    """The same function, compiled by itself: what torch.compile keeps, and its limit of kinds, hang on a function's code,
    which all networks and stages of a process share."""
    return types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)


def _even(x: Any) -> Any:
    """A tangent in the dtype of its value: before the first block it may be narrower, which would be a kind of its own."""
    return Dual(x.value, x.tangent.to(x.value.dtype)) if isinstance(x, Dual) else x


def _dead_tangents():
    """`drop_dead_tangents` as Inductor takes it, with what its cache of compiled graphs must know."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class DeadTangents(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            graph_passes.drop_dead_tangents(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((graph_passes.__file__,))

    return DeadTangents()


@progress.phase("compiling the network and comparing it with the eager one", quiet=True)
def guard(engine: Any, loss: Callable[[], Any], name: str = "compile") -> None:
    """Compare the compiled network with the eager one in every kind of call that `loss()`, one real batch, makes of it.

    Against float64 and plain torch, the compiled value and tangent may err by twice what the eager ones do, plus twice
    what rounding the exact answer to their dtype costs. Raises CompileError otherwise; the stage has changed nothing.
    """
    exact = engine.copy().double()
    for grad, arguments, named in _calls(engine, loss):
        try:
            with torch.set_grad_enabled(grad):
                got = _outputs(engine(*arguments, **named))
        except Exception as error:  # Dynamo, Inductor and the C++ compiler each have their own
            head = " ".join(str(error).strip().splitlines()[:2])  # Dynamo puts the cause in its second line
            raise CompileError(f"{name}: torch.compile failed: {type(error).__name__}: {head}") from error
        with torch.no_grad():
            plain = _outputs(engine.eager(*arguments, **named))
            with use("reference"):
                wide = tree_map(lambda x: x.double() if _is_real(x) else x, (arguments, named))
                truth = _outputs(exact(*wide[0], **wide[1]))
        if got.keys() != plain.keys():
            raise CompileError(f"{name}: the compiled network lost its tangent; train this stage without compile")
        for what, y in got.items():
            eager, wanted = plain[what], truth[what]
            error, limit = distance(y, wanted), 2 * (distance(eager, wanted) + distance(wanted.to(eager.dtype), wanted))
            if not error <= limit:
                raise CompileError(
                    f"{name}: the compiled network's {what} errs by {error:.1e}, eager's by {distance(eager, wanted):.1e} "
                    f"(relative to float64); train this stage without compile"
                )


def distance(y: Tensor, exact: Tensor) -> float:
    """|y - exact| / |exact| over all elements, in float64; 0 where both are 0."""
    error, size = (float(torch.linalg.vector_norm(x.double())) for x in (y.detach().double() - exact.double(), exact))
    return error / size if size else error


def _calls(engine: Any, loss: Callable[[], Any]) -> list[tuple[bool, tuple, dict[str, Any]]]:
    """(with gradients, arguments, those by name) of one call of each kind that `loss()` makes of the engine."""
    kinds: dict[str, tuple[bool, tuple, dict[str, Any]]] = {}

    def record(*arguments: Any, **named: Any) -> Any:
        grad = torch.is_grad_enabled()
        leaves = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves((arguments, named))]
        kinds.setdefault(str((grad, [type(x) for x in arguments], [*named], leaves)), (grad, arguments, named))
        return engine.eager(*arguments, **named)

    forward, engine.forward = engine.forward, record
    try:
        loss()
    finally:
        engine.forward = forward
    return list(kinds.values())


def _outputs(y: Any) -> dict[str, Tensor]:
    """What a network gives, by name: its value, the tangent where there is one, and what it was asked for beside them."""
    first, beside = (y, ()) if isinstance(y, Tensor | Dual) else (y[0], y[1:])
    found = dict(zip(NAMES, first)) if isinstance(first, Dual) else {NAMES[0]: first}
    return found | {f"output {i}": x for i, x in enumerate(beside, 2)}


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
