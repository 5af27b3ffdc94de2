"""Shapes of tensors, and networks whose batch size is baked in, freed of it where that is exact.

TensorFlow's own shape functions do the inference: the graph is imported, and not run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_INT32, DT_INT64

from transfer.graph import dropout, guards
from transfer.graph.graph_def import canonical, constant, downstream, operation_of, with_nodes
from transfer.graph.network import Network
from transfer.graph.randomness import SEED

Shape = tuple[int | None, ...] | None
Leaf = tuple[tf.DType, Shape]
MAX_ELEMENTS = 2**31
"""Of one tensor for a handful of examples; VGG16's largest has 3e6 an example."""
_STATES_BATCH = {"Reshape": 1, "Conv2DBackpropInput": 0}
"""Operation to its operand with the sizes of what it gives."""
MAX_TOTAL = 2**32
"""Elements of all tensors together, per example; VGG19's have 3e8 for images of 512 pixels."""
MAX_GROWN = 2**28
"""Elements, per example, of tensors ``GROWTH`` times as large as all that they are made from."""
GROWTH = 64
_PROBES = (3, 5)
_SMALL_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


def infer(network: Network, leaves: Mapping[str, Leaf] | None = None) -> dict[str, Shape]:
    """Tensor to shape, for all tensors of a network and for its input.

    Args:
        network: its arithmetic for inference counts.
        leaves: types and shapes of the input and of all variables; those that the network states,
            if they are not given.

    Raises:
        ValueError: if the graph is no valid one for its input, or a tensor would have over
            ``MAX_ELEMENTS`` elements.
    """
    return _infer(network.graph_def, leaves or _leaves(network, network.input_shape))


def output_shapes(network: Network, example: Sequence[int | None]) -> dict[int, Shape]:
    """Batch size to the output's shape, for two batch sizes.

    What both agree on holds for every batch: a width that a reshape computes from the batch size is
    known here, where an open batch size hides it.

    Args:
        network: its arithmetic for inference counts.
        example: shape of one example of the input; ``None`` for dimensions that are not known.

    Raises:
        ValueError: if the graph does not take such batches.
    """
    return {
        batch: _infer(network.graph_def, _leaves(network, (batch, *example)))[network.output]
        for batch in _PROBES
    }


def free_batch(network: Network) -> Network:
    """A network that takes batches of any size, or says which it takes.

    Where a reshape states the batch size, it is left open instead; the result is the same. Where
    that does not help (a constant of one batch is added, say), ``batch_size`` is set.

    Raises:
        ValueError: if the graph is no valid one for its own input.
    """
    input_shape = network.input_shape
    if network.output == network.input:
        return network
    if not input_shape:
        infer(network)
        return network
    if all(_takes_any_batch(network, graph_def, input_shape) for graph_def in network.graphs):
        return network
    batch_size = input_shape[0]
    if batch_size is None:
        if _ignores_batch(network, input_shape):
            return network  # no value per example: a mean of all
        # The placeholder leaves the batch open, and something after it does not.
        batch_size = (infer(network)[network.output] or (None,))[0] or _only_batch(network)
    if batch_size is None:
        return network
    fixed = (batch_size, *input_shape[1:])
    freed = [_open_batch(network, g, _infer(g, _leaves(network, fixed))) for g in network.graphs]
    if all(_takes_any_batch(network, graph_def, input_shape) for graph_def in freed):
        return replace(network, graph_def=freed[0], training=freed[1] if freed[1:] else None)
    shape = _infer(network.graph_def, _leaves(network, fixed))[network.output]
    if shape is not None and (not shape or shape[0] not in (None, batch_size)):
        return network  # no value per example: a loss, a mean
    return replace(network, batch_size=batch_size)


def _takes_any_batch(network: Network, graph_def: GraphDef, input_shape: Sequence[Any]) -> bool:
    """Whether the shapes fit for other batches, and the output has one row, or more, for each."""
    first_dims = []
    for batch in _PROBES:
        try:
            shape = _infer(graph_def, _leaves(network, (batch, *input_shape[1:])))[network.output]
        except ValueError:
            return False
        first_dims.append(shape[0] if shape else None)
    return None in first_dims or first_dims[0] != first_dims[1]


def _only_batch(network: Network) -> int | None:
    """The batch that a graph states in a reshape or a transposed convolution, else the smallest
    that fits: two towers take even ones."""
    constants = {node.name: node for node in network.graph_def.node if node.op == "Const"}
    stated = []
    for node in network.graph_def.node:
        if node.op in _STATES_BATCH:
            value = constant(constants.get(operation_of(node.input[_STATES_BATCH[node.op]])))
            stated += [] if value is None else [int(size) for size in value.ravel()[:1]]
    input_shape = network.input_shape or ()
    for batch in (*sorted({size for size in stated if size > 1}), *_SMALL_BATCHES):
        with contextlib.suppress(ValueError):
            shapes = [
                _infer(g, _leaves(network, (batch, *input_shape[1:]))) for g in network.graphs
            ]
            if all((shape[network.output] or (None,))[0] in (None, batch) for shape in shapes):
                return batch
    return None


def _ignores_batch(network: Network, input_shape: Sequence[Any]) -> bool:
    """Whether the output has one shape for batches of all sizes."""
    try:
        first, second = output_shapes(network, input_shape[1:]).values()
    except ValueError:
        return False
    return first == second


def _open_batch(network: Network, graph_def: GraphDef, shapes: Mapping[str, Shape]) -> GraphDef:
    """The graph with the batch left open in each reshape that keeps it, in transposed convolutions,
    and in dropout's masks."""
    batch = (shapes[network.input] or (None,))[0]
    live = downstream(graph_def.node, [network.input]) | {operation_of(network.input)}
    states_batch = {
        node.name: np.ravel(value)
        for node in graph_def.node
        if (value := constant(node)) is not None and np.ravel(value)[:1].tolist() == [batch]
    }
    masks = {place.uniform: place.source for place in dropout.find(graph_def.node, live)}
    nodes: list[NodeDef] = []
    for node in graph_def.node:
        copy = NodeDef()
        copy.CopyFrom(node)
        target = None
        if node.op == "Reshape" and operation_of(node.input[1]) in states_batch:
            target = _open_target(shapes, node, batch)
        elif node.name in masks and operation_of(node.input[0]) in states_batch:
            target = NodeDef(name=f"{node.name}/open_batch", op="Shape", input=[masks[node.name]])
            target.attr["T"].type = node.attr["dtype"].type  # a mask has the type of its values
            target.attr["out_type"].type = DT_INT64
        elif (
            node.op == "Conv2DBackpropInput"
            and operation_of(node.input[0]) in states_batch
            and (shapes.get(canonical(node.input[2])) or (None,))[0] == batch
        ):
            nodes += _open_sizes(node, states_batch[operation_of(node.input[0])])
            copy.input[0] = nodes[-1].name
        if target is not None:
            nodes.append(target)
            copy.input[1 if node.op == "Reshape" else 0] = target.name
            copy.attr["Tshape" if node.op == "Reshape" else "T"].type = DT_INT64
        nodes.append(copy)
    return with_nodes(graph_def, nodes)


def _open_target(
    shapes: Mapping[str, Shape], reshape: NodeDef, batch: int | None
) -> NodeDef | None:
    """The target of a reshape that keeps the batch, with the batch left open."""
    before, after = shapes.get(canonical(reshape.input[0])), shapes.get(f"{reshape.name}:0")
    if not before or not after or not before[0] == after[0] == batch or None in after:
        return None
    target = NodeDef(name=f"{reshape.name}/open_batch", op="Const")
    target.attr["dtype"].type = DT_INT64
    target.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([-1, *after[1:]], tf.int64))
    return target


def _open_sizes(convolution: NodeDef, sizes: np.ndarray) -> list[NodeDef]:
    """The size of what a transposed convolution gives, with the batch of what it takes; last."""
    name = f"{convolution.name}/open_batch"
    shape = NodeDef(name=f"{name}/shape", op="Shape", input=[convolution.input[2]])
    shape.attr["T"].CopyFrom(convolution.attr["T"])
    shape.attr["out_type"].type = DT_INT32
    begin, one = _integers(f"{name}/begin", [0]), _integers(f"{name}/one", [1])
    batch = NodeDef(name=f"{name}/batch", op="Slice", input=[shape.name, begin.name, one.name])
    batch.attr["T"].type = batch.attr["Index"].type = DT_INT32
    rest, axis = _integers(f"{name}/rest", sizes[1:]), _integers(f"{name}/axis", 0)
    whole = NodeDef(name=name, op="ConcatV2", input=[batch.name, rest.name, axis.name])
    whole.attr["N"].i = 2
    whole.attr["T"].type = whole.attr["Tidx"].type = DT_INT32
    return [shape, begin, one, batch, rest, axis, whole]


def _integers(name: str, value: Any) -> NodeDef:
    node = NodeDef(name=name, op="Const")
    node.attr["dtype"].type = DT_INT32
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.int32))
    return node


def _leaves(network: Network, input_shape: Shape) -> dict[str, Leaf]:
    """What a network computes from, the input first."""
    leaves = {network.input: (network.input_dtype or tf.float32, input_shape)}
    for variable in network.variables:
        leaves[canonical(variable.name)] = (variable.dtype, variable.shape)
    return leaves


def _infer(graph_def: GraphDef, leaves: Mapping[str, Leaf]) -> dict[str, Shape]:
    leaves = {**leaves, SEED: (tf.int32, (2,))}
    given = {name: shape for name, (_, shape) in leaves.items()}
    known = _constant_shapes(graph_def) | given
    guards.check_ranks(graph_def, known)
    checked = guards.with_ranks(graph_def, known)
    used = {canonical(edge) for node in graph_def.node for edge in node.input}
    with tf.Graph().as_default() as graph:
        try:
            tensors = _placeholders({name: leaves[name] for name in leaves if name in used})
            tf.graph_util.import_graph_def(checked, input_map=tensors, name="n")
        except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
            raise ValueError(f"the graph is damaged: {error}") from error
        shapes = {
            _own_name(tensor): _sizes(tensor)
            for operation in graph.get_operations()
            for tensor in operation.outputs
        }
        made_from = {
            _own_name(tensor): [shapes[_own_name(source)] for source in operation.inputs]
            for operation in graph.get_operations()
            for tensor in operation.outputs
        }
    _, input_shape = next(iter(leaves.values()))
    _check_sizes(shapes, made_from, (input_shape or (None,))[0] or 1)
    shapes |= given
    guards.check_ranks(graph_def, shapes)
    return shapes


def _own_name(tensor: tf.Tensor) -> str:
    return tensor.name.removeprefix("n/")


def _placeholders(leaves: Mapping[str, Leaf]) -> dict[str, tf.Tensor]:
    """Placeholders of these types and shapes. Made one by one, they take as long as all the rest of
    shape inference."""
    nodes = []
    for number, (dtype, shape) in enumerate(leaves.values()):
        node = NodeDef(name=f"leaf_{number}", op="Placeholder")
        node.attr["dtype"].type = dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
        nodes.append(node)
    # In older versions, a placeholder of rank 0 is one of any rank.
    graph_def = GraphDef(node=nodes, versions={"producer": tf.version.GRAPH_DEF_VERSION})
    names = [f"{node.name}:0" for node in nodes]
    tensors = tf.graph_util.import_graph_def(graph_def, return_elements=names, name="leaves")
    return dict(zip(leaves, tensors, strict=True))


def _constant_shapes(graph_def: GraphDef) -> dict[str, Shape]:
    return {
        f"{node.name}:0": tuple(dim.size for dim in node.attr["value"].tensor.tensor_shape.dim)
        for node in graph_def.node
        if node.op == "Const"
    }


def _check_sizes(
    shapes: Mapping[str, Shape], made_from: Mapping[str, Sequence[Shape]], batch: int
) -> None:
    """Refuse tensors that would fill the memory, each by itself or all together."""
    total = grown = 0
    for name, shape in shapes.items():
        elements = _num_elements(shape)
        if elements > MAX_ELEMENTS:
            raise ValueError(
                f"tensor {name!r} would have {elements:,} elements, more than "
                f"{MAX_ELEMENTS:,}; the graph is damaged, or made to harm"
            )
        per_example = elements // batch if shape and shape[0] == batch else elements
        total += per_example
        if per_example > GROWTH * sum(map(_num_elements, made_from[name])):
            grown += per_example
        for what, number, most in (("", total, MAX_TOTAL), ("filled ", grown, MAX_GROWN)):
            if number > most:
                raise ValueError(
                    f"the {what}tensors up to {name!r} would have {number:,} elements together, "
                    f"more than {most:,}; the graph is damaged, or made to harm"
                )


def _num_elements(shape: Shape) -> int:
    return math.prod(size or 1 for size in shape or ())


def _sizes(tensor: tf.Tensor) -> Shape:
    with contextlib.suppress(ValueError):
        return tuple(tensor.shape.as_list())
    return None
