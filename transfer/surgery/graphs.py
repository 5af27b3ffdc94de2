"""Reading a GraphDef: names of tensors, what a tensor depends on, shapes and types.

A tensor's name is ``operation:index`` everywhere; a bare operation's name means its output 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef


def split_tensor_name(name: str) -> tuple[str, int]:
    """``"a/b:1"`` to ``("a/b", 1)``; ``"a/b"`` to ``("a/b", 0)``."""
    operation, colon, index = name.rpartition(":")
    return (operation, int(index)) if colon and index.isdigit() else (name, 0)


def canonical(name: str) -> str:
    """``"a"`` and ``"a:0"`` to ``"a:0"``; the control dependency ``"^a"`` stays what it is."""
    if name.startswith("^"):
        return name
    return "{}:{}".format(*split_tensor_name(name))


def ancestors(graph_def: GraphDef, output: str, stop_at: Iterable[str] = ()) -> list[NodeDef]:
    """The nodes that a tensor depends on, without passing ``stop_at``, in the graph's order.

    Control dependencies order side effects, of which there are none here; only those that say in
    which branch of a conditional a node lives are followed.

    Raises:
        ValueError: if a node refers to one that is not there.
    """
    nodes = {node.name: node for node in graph_def.node}
    stops = {canonical(name) for name in stop_at}
    follow_control = any(node.op == "Switch" for node in graph_def.node)
    reached: set[str] = set()
    pending = [canonical(output)] if canonical(output) not in stops else []
    while pending:
        name, _ = split_tensor_name(pending.pop())
        if name in reached:
            continue
        if name not in nodes:
            raise ValueError(f"the graph is damaged: it refers to {name!r}, which it does not have")
        reached.add(name)
        for edge in nodes[name].input:
            if edge.startswith("^"):
                if follow_control and is_branch_pivot(nodes.get(edge[1:])):
                    pending.append(edge[1:])
            elif canonical(edge) not in stops:
                pending.append(edge)
    return [node for node in graph_def.node if node.name in reached]


def placeholders(nodes: Iterable[NodeDef]) -> list[NodeDef]:
    """The nodes that must be fed."""
    return [node for node in nodes if node.op in ("Placeholder", "PlaceholderV2")]


def static_shape(node: NodeDef, index: int = 0) -> tuple[int | None, ...] | None:
    """The shape that a node states for one of its outputs; ``None`` if it states none.

    TF 1.1 and older leave ``shape`` empty and write the truth to ``_output_shapes``.
    """
    shapes = node.attr["_output_shapes"].list.shape if "_output_shapes" in node.attr else []
    if index < len(shapes):
        shape = shapes[index]
    elif "shape" in node.attr and node.attr["shape"].shape.dim:
        shape = node.attr["shape"].shape
    else:
        return None
    if shape.unknown_rank:
        return None
    return tuple(dim.size if dim.size >= 0 else None for dim in shape.dim)


def dtype_of(node: NodeDef, index: int = 0) -> tf.DType | None:
    """The element type that a node states for one of its outputs; ``None`` if it states none."""
    for name in ("dtype", "T"):
        if name in node.attr:
            return tf.as_dtype(node.attr[name].type)
    for name in ("component_types", "output_types"):
        if name in node.attr and index < len(node.attr[name].list.type):
            return tf.as_dtype(node.attr[name].list.type[index])
    return None


def is_branch_pivot(node: NodeDef | None) -> bool:
    """Branches of a conditional begin with an Identity of a Switch of the predicate."""
    return node is not None and (
        node.op == "Switch" or (node.op == "Identity" and "Switch" in (node.input or [""])[0])
    )
