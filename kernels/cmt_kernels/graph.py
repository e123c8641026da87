"""A pass over compiled graphs: a fused op whose tangent nobody reads computes none.

An op with a tangent gives value and tangent at once, which no compiler can take apart. Where a block is run again for
the backward pass (activation checkpointing) only its value is wanted; this pass takes the tangent arguments off such a
call and erases what made them.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

# the convention of every op with tangents, in csrc/ops.cpp and */triton.py: results (y, y_dot, ...), arguments *_dot, and
# k rows of them where the op takes k
NAMESPACES = ("cmt", "cmt_triton")


def drop_dead_tangents(graph: Graph) -> int:
    """Calls of our ops with tangents that nothing reads become plain calls, in place. Returns how many did."""
    dropped = 0
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)  # what was made for a tangent that is gone by now: later nodes come first here
        elif _has_tangent(node) and not any(_is_tangent(user) for user in node.users):
            names = [argument.name for argument in node.target._schema.arguments]
            given = dict(zip(names, node.args)) | dict(node.kwargs)
            plain = {name: None if name.endswith("_dot") else 0 if name == "k" else x for name, x in given.items()}
            node.args, node.kwargs = tuple(plain[name] for name in names if name in plain), {}
            dropped += 1
    return dropped


def _has_tangent(node: Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "namespace", None) not in NAMESPACES:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    return any(name.endswith("_dot") and x is not None for name, x in given.items())


def _is_tangent(user: Node) -> bool:
    """Whether a reader of an op's results reads the tangent; anything but an unpacking might."""
    return user.target is not operator.getitem or user.args[1] == 1
