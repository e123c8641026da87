"""A pass over compiled graphs: a fused op whose tangent nobody reads computes none.

An op with a tangent gives value and tangent at once, which no compiler can take apart. Where a block is run again for
the backward pass (activation checkpointing) only its value is wanted; this pass takes the tangent arguments off such a
call and erases what made them.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

# the ops that give (y, y_dot, ...) from arguments of which those named *_dot are tangents, None for a plain call, with k rows
# of them where the op takes k; a loss may take a tangent too, but there it is part of the value
OPS = ("attention", "gated_residual", "gelu", "modulated_norm", "qk_norm")
NAMES = {f"{namespace}::{op}" for namespace in ("cmt", "cmt_triton") for op in OPS}


def drop_dead_tangents(graph: Graph) -> int:
    """Calls of our ops with tangents that nothing reads become plain calls, in place. Returns how many did."""
    dropped = 0
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)  # what was made for a tangent that is gone by now: later nodes come first here
        elif _has_tangent(node) and not any(_is_tangent(user) for user in node.users):
            plain = lambda name, x: None if name.endswith("_dot") else 0 if name == "k" else x
            names = [argument.name for argument in node.target._schema.arguments]
            node.args = tuple(plain(name, x) for name, x in zip(names, node.args))
            node.kwargs = {name: plain(name, x) for name, x in node.kwargs.items()}
            dropped += 1
    return dropped


def _has_tangent(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.name not in NAMES:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    return any(name.endswith("_dot") and x is not None for name, x in given.items())


def _is_tangent(user: Node) -> bool:
    """Whether a reader of an op's results reads the tangent; anything but an unpacking might."""
    return user.target is not operator.getitem or user.args[1] == 1
