"""The pass over compiled graphs: calls whose tangent nobody reads become plain, and nothing else changes."""

from __future__ import annotations

import importlib
import importlib.util
import operator

import pytest
import torch
from cmt_kernels.graph import NAMES, drop_dead_tangents
from torch.fx import Graph, Node

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def op(name: str):
    """An operator by its name, once the module that makes it has been imported."""
    namespace, _, plain = name.partition("::")
    importlib.import_module(f"cmt_kernels.{plain.removeprefix('triton_')}.triton")
    return getattr(getattr(torch.ops, namespace), plain).default


def call(graph: Graph, name: str, **given) -> Node:
    """A call of an op: a placeholder for each tensor argument that is not given."""
    arguments = []
    for argument in op(name)._schema.arguments:
        kind = str(argument.type)
        fresh = graph.placeholder(argument.name) if "Tensor" in kind else 1
        arguments.append(given.get(argument.name, fresh))
    return graph.call_function(op(name), tuple(arguments))


def result(graph: Graph, node: Node, i: int) -> Node:
    return graph.call_function(operator.getitem, (node, i))


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n.startswith("cmt_triton") and "attention" not in n))
def test_a_tangent_that_nobody_reads_goes_with_what_made_it(name: str) -> None:
    graph = Graph()
    dots = [a.name for a in op(name)._schema.arguments if a.name.endswith("_dot")]
    moved = graph.call_function(torch.ops.aten.cos.default, (graph.placeholder("z"),))
    node = call(graph, name, **dict.fromkeys(dots, moved))
    value, unread = result(graph, node, 0), result(graph, node, 1)
    graph.output(value)
    assert drop_dead_tangents(graph) == 1 and unread not in graph.nodes and moved not in graph.nodes
    names = [a.name for a in node.target._schema.arguments]
    left = dict(zip(names, node.args))
    assert all(left[dot] is None for dot in dots) and left.get("k", 0) == 0
    assert all(isinstance(x, Node) for key, x in left.items() if key not in dots and "Tensor" in str(key))
    assert drop_dead_tangents(graph) == 0


@pytest.mark.parametrize("how", ["read", "returned", "whole"])
def test_a_tangent_that_is_read_stays(how: str) -> None:
    graph = Graph()
    node = call(graph, "cmt::attention")
    value, dot = result(graph, node, 0), result(graph, node, 1)
    more = {"read": [graph.call_function(torch.ops.aten.cos.default, (dot,))], "returned": [dot], "whole": [node]}[how]
    graph.output((value, *more))
    before = node.args
    assert drop_dead_tangents(graph) == 0 and node.args == before


def test_a_tangent_inside_a_loss_is_part_of_its_value() -> None:
    graph = Graph()
    node = call(graph, "cmt::triton_meanflow_loss")
    graph.output((result(graph, node, 0), result(graph, node, 2)))
    before = node.args
    assert drop_dead_tangents(graph) == 0 and node.args == before and None not in before


def test_what_acts_on_memory_is_not_erased() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    written = graph.call_function(torch.ops.aten.copy_.default, (x, y))
    graph.output(x)
    drop_dead_tangents(graph)
    assert written in graph.nodes
