"""Turn a network with several taps into one with a single output, the features of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.graph_def import dtype_of, operation_of, split_tensor_name, with_nodes
from transfer.graph.network import Network
from transfer.graph.shapes import infer

NAME = "features"
"""Name of the operation that outputs the concatenated features; ``features_1`` ... if taken."""
_POOLINGS = {"avg": ("Mean",), "max": ("Max",), "avg_max": ("Mean", "Max")}


def concatenated(network: Network, pooling: Literal["avg", "max", "avg_max"] = "avg") -> Network:
    """A network whose only output is the taps, pooled over height and width and concatenated.

    The operations are added to the graph, so that everything that works with one tap works with
    the features of several: cuts, caches, and models that stock TensorFlow opens.

    Args:
        network: a network with several taps; one without is returned unchanged.
        pooling: how taps ``[batch, height, width, channels]`` are reduced to ``[batch, channels]``;
            ``avg_max`` gives ``[batch, 2 * channels]``, the averages first.

    Returns:
        A network with the output ``[batch, width]``, in the order of the taps.

    Raises:
        ValueError: if a tap is neither ``[batch, width]`` nor ``[batch, height, width, channels]``,
            or the graph is not valid for its own input.
    """
    if not network.taps:
        return network
    shapes = infer(network)
    name = _free_name(network)
    by_name = {node.name: node for node in network.graph_def.node}
    dtypes = [_dtype(network, by_name, tensor) for tensor in network.outputs]
    common = dtypes[0] if {*dtypes} == {dtypes[0]} and dtypes[0].is_floating else tf.float32
    added = [_constant(f"{name}/axes", [1, 2]), _constant(f"{name}/axis", 1)]
    parts = []
    for number, (tap, tensor) in enumerate(network.taps.items()):
        shape = shapes.get(tensor)
        if shape is None or len(shape) not in (2, 4):
            raise ValueError(
                f"tap {tap!r} has shape {'unknown' if shape is None else shape}; expected features "
                "[batch, width], or feature maps [batch, height, width, channels]"
            )
        if dtypes[number] != common:
            node = NodeDef(name=f"{name}/cast_{number}", op="Cast", input=[tensor])
            node.attr["SrcT"].type = dtypes[number].as_datatype_enum
            node.attr["DstT"].type = common.as_datatype_enum
            added.append(node)
            tensor = f"{node.name}:0"
        if len(shape) == 2:
            parts.append(tensor)
            continue
        for operation in _POOLINGS[pooling]:
            kind = "max" if operation == "Max" else "avg"
            node = NodeDef(name=f"{name}/{kind}_{number}", op=operation, input=[tensor])
            node.input.append(added[0].name)
            node.attr["T"].type = common.as_datatype_enum
            node.attr["Tidx"].type = tf.int32.as_datatype_enum
            node.attr["keep_dims"].b = False
            added.append(node)
            parts.append(f"{node.name}:0")
    added.append(_concatenation(name, parts, added[1].name, common))
    graphs = [with_nodes(graph, [*graph.node, *added]) for graph in network.graphs]
    return replace(
        network,
        graph_def=graphs[0],
        training=graphs[1] if graphs[1:] else None,
        output=f"{name}:0",
        taps={},
    )


def _free_name(network: Network) -> str:
    names = {node.name for graph in network.graphs for node in graph.node}
    names |= {variable.name for variable in network.variables} | {operation_of(network.input)}
    taken = {name.split("/")[0] for name in names}
    numbered = (f"{NAME}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([NAME], numbered) if name not in taken)


def _dtype(network: Network, by_name: dict[str, NodeDef], tensor: str) -> tf.DType:
    if tensor == network.input:
        return network.input_dtype or tf.float32
    operation, index = split_tensor_name(tensor)
    return dtype_of(by_name[operation], index) or tf.float32


def _constant(name: str, value: Any) -> NodeDef:
    node = NodeDef(name=name, op="Const")
    node.attr["dtype"].type = tf.int32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(value), tf.int32))
    return node


def _concatenation(name: str, parts: Sequence[str], axis: str, dtype: tf.DType) -> NodeDef:
    if len(parts) == 1:
        node = NodeDef(name=name, op="Identity", input=parts)
    else:
        node = NodeDef(name=name, op="ConcatV2", input=[*parts, axis])
        node.attr["N"].i = len(parts)
        node.attr["Tidx"].type = tf.int32.as_datatype_enum
    node.attr["T"].type = dtype.as_datatype_enum
    return node
