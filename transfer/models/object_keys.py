"""Checkpoint keys of the variables of a TensorFlow 2 SavedModel (object-based checkpoints).

The variables of the graph have no keys of their own: functions are bound to objects of a program,
and the checkpoint contains an object graph of the same objects. A variable is located in both by
its path from the root object: ``("layers", "0", "kernel")``.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from transfer.graph import VARIABLES, data_inputs, operation_of

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""The checkpoint entry with the object graph."""

MAX_DEPTH = 100
"""Maximum depth of nested objects, and thus maximum length of paths."""

Path = tuple[str, ...]


def variable_paths(meta: MetaGraphDef) -> dict[str, Path]:
    """Variable name to the path of its object; empty for a TensorFlow 1 SavedModel."""
    objects = meta.object_graph_def
    if not objects.nodes:
        return {}
    paths: dict[int, Path] = {0: ()}
    pending = [0]
    for number in pending:  # breadth-first search; the list grows during iteration
        for child in objects.nodes[number].children:
            is_known = child.node_id in paths or not 0 <= child.node_id < len(objects.nodes)
            if not is_known and len(paths[number]) < MAX_DEPTH:
                paths[child.node_id] = (*paths[number], child.local_name)
                pending.append(child.node_id)
    handles = {node.name for node in meta.graph_def.node if node.op in VARIABLES}
    variables = {}
    for node in meta.graph_def.node:
        bound = objects.concrete_functions.get(node.attr["f"].func.name) if node.attr else None
        if bound is None or not bound.bound_inputs:
            continue
        arguments = [operation_of(edge) for edge in data_inputs(node)]
        for name, number in zip(
            arguments[-len(bound.bound_inputs) :], bound.bound_inputs, strict=False
        ):
            if name in handles and number in paths:
                variables[name] = paths[number]
    return variables


def checkpoint_keys(paths: Mapping[str, Path], serialized: bytes = b"") -> dict[str, str]:
    """Variable name to checkpoint key.

    Args:
        paths: from ``variable_paths``.
        serialized: value of the checkpoint entry ``KEY``.

    Raises:
        ValueError: if ``serialized`` is damaged.
    """
    try:
        nodes = TrackableObjectGraph.FromString(serialized).nodes
    except (DecodeError, TypeError) as error:
        raise ValueError(f"the checkpoint is damaged at {KEY}: {error}") from error
    keys = {}
    for name, path in paths.items():
        number: int | None = 0
        for part in path:
            children = nodes[number].children if number is not None and number < len(nodes) else ()
            number = next((c.node_id for c in children if c.local_name == part), None)
        if number is not None and number < len(nodes):
            for attribute in nodes[number].attributes:
                if attribute.name == "VARIABLE_VALUE":
                    keys[name] = attribute.checkpoint_key
    return keys
