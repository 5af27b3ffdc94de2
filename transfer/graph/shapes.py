"""Shape inference, and removal of fixed batch sizes from networks where that is exact.

Uses TensorFlow's own shape functions: the graph is imported, but not run.
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
"""Maximum size of a tensor for a few examples; VGG16's largest has 3e6 elements per example."""
_STATES_BATCH = {"Reshape": 1, "Conv2DBackpropInput": 0}
"""Operation type to the index of its operand with the output shape."""
MAX_TOTAL = 2**32
"""Maximum total number of elements per example; VGG19 has 3e8 for images of 512 pixels."""
MAX_GROWN = 2**28
"""Maximum number of elements per example in tensors ``GROWTH`` times larger than their inputs."""
GROWTH = 64
_PROBES = (3, 5)
_SMALL_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


def infer(network: Network, leaves: Mapping[str, Leaf] | None = None) -> dict[str, Shape]:
    """Infer the shapes of all tensors of a network, including its input.

    Args:
        network: the network; its graph for inference is used.
        leaves: dtypes and shapes of the input and of all variables; defaults to those that the
            network states.

    Raises:
        ValueError: if the graph is not valid for its input, or a tensor would have over
            ``MAX_ELEMENTS`` elements.
    """
    return _infer(network.graph_def, leaves or _leaves(network, network.input_shape))


def output_shapes(network: Network, example: Sequence[int | None]) -> dict[int, dict[str, Shape]]:
    """Batch size to the shape of each output, for two batch sizes.

    Sizes on which both agree hold for every batch, including a width that a reshape computes from
    the batch size, which inference with an unknown batch size does not find.

    Args:
        network: the network; its graph for inference is used.
        example: shape of one example of the input; ``None`` for unknown dimensions.

    Raises:
        ValueError: if the graph does not accept such batches.
    """
    return {batch: _outputs(network, network.graph_def, (batch, *example)) for batch in _PROBES}


def free_batch(network: Network) -> Network:
    """Make a network accept any batch size, or record the only one it accepts.

    A batch size fixed in a reshape is replaced by -1, which does not change the result. If that is
    not sufficient (for example, if a constant of one batch is added), ``batch_size`` is set.

    Raises:
        ValueError: if the graph is not valid for its own input.
    """
    input_shape = network.input_shape
    if {*network.outputs} == {network.input}:
        return network
    if not input_shape:
        infer(network)
        return network
    if all(_takes_any_batch(network, graph_def, input_shape) for graph_def in network.graphs):
        return network
    batch_size = input_shape[0]
    if batch_size is None:
        if _ignores_batch(network, input_shape):
            return network  # no value per example, such as a mean over the batch
        # The placeholder does not fix the batch size, but a later operation does.
        shapes = infer(network)
        stated = [(shapes[name] or (None,))[0] for name in network.outputs]
        batch_size = next(filter(None, stated), None) or _only_batch(network)
    if batch_size is None:
        return network
    fixed = (batch_size, *input_shape[1:])
    freed = [_open_batch(network, g, _infer(g, _leaves(network, fixed))) for g in network.graphs]
    if all(_takes_any_batch(network, graph_def, input_shape) for graph_def in freed):
        return replace(network, graph_def=freed[0], training=freed[1] if freed[1:] else None)
    for shape in _outputs(network, network.graph_def, fixed).values():
        if shape is not None and (not shape or shape[0] not in (None, batch_size)):
            return network  # no value per example, such as a loss or a mean
    return replace(network, batch_size=batch_size)


def _takes_any_batch(network: Network, graph_def: GraphDef, input_shape: Sequence[Any]) -> bool:
    """Whether other batch sizes are valid, and the number of output rows depends on them."""
    try:
        probes = [_outputs(network, graph_def, (batch, *input_shape[1:])) for batch in _PROBES]
    except ValueError:
        return False
    for name in network.outputs:
        first_dims = [shape[0] if (shape := shapes[name]) else None for shapes in probes]
        if None not in first_dims and first_dims[0] == first_dims[1]:
            return False
    return True


def _outputs(network: Network, graph_def: GraphDef, input_shape: Shape) -> dict[str, Shape]:
    """The shapes of the outputs of a network for an input of this shape."""
    shapes = _infer(graph_def, _leaves(network, input_shape))
    return {name: shapes[name] for name in network.outputs}


def _only_batch(network: Network) -> int | None:
    """The batch size fixed in a reshape or a transposed convolution, else the smallest that fits:
    two towers need an even one."""
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
                shape
                for graph_def in network.graphs
                for shape in _outputs(network, graph_def, (batch, *input_shape[1:])).values()
            ]
            if all((shape or (None,))[0] in (None, batch) for shape in shapes):
                return batch
    return None


def _ignores_batch(network: Network, input_shape: Sequence[Any]) -> bool:
    """Whether the shapes of the outputs do not depend on the batch size."""
    try:
        first, second = output_shapes(network, input_shape[1:]).values()
    except ValueError:
        return False
    return first == second


def _open_batch(network: Network, graph_def: GraphDef, shapes: Mapping[str, Shape]) -> GraphDef:
    """Remove the fixed batch size from each reshape that preserves it, from transposed convolutions
    and from dropout masks."""
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
            # The other sizes may be 1, those of masks that channels or positions share.
            sizes = states_batch[operation_of(node.input[0])]
            dtype = node.attr["dtype"].type  # masks have the dtype of the values
            nodes += _open_sizes(node.name, masks[node.name], dtype, sizes)
            copy.input[0] = nodes[-1].name
            copy.attr["Tshape" if "Tshape" in node.attr else "T"].type = DT_INT32
        elif (
            node.op == "Conv2DBackpropInput"
            and operation_of(node.input[0]) in states_batch
            and (shapes.get(canonical(node.input[2])) or (None,))[0] == batch
        ):
            sizes = states_batch[operation_of(node.input[0])]
            nodes += _open_sizes(node.name, node.input[2], node.attr["T"].type, sizes)
            copy.input[0] = nodes[-1].name
        if target is not None:
            nodes.append(target)
            copy.input[1] = target.name
            copy.attr["Tshape"].type = DT_INT64
        nodes.append(copy)
    return with_nodes(graph_def, nodes)


def _open_target(
    shapes: Mapping[str, Shape], reshape: NodeDef, batch: int | None
) -> NodeDef | None:
    """The target shape of a reshape that preserves the batch, with -1 as the batch size."""
    before, after = shapes.get(canonical(reshape.input[0])), shapes.get(f"{reshape.name}:0")
    if not before or not after or not before[0] == after[0] == batch or None in after:
        return None
    target = NodeDef(name=f"{reshape.name}/open_batch", op="Const")
    target.attr["dtype"].type = DT_INT64
    target.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([-1, *after[1:]], tf.int64))
    return target


def _open_sizes(operation: str, source: str, dtype: int, sizes: np.ndarray) -> list[NodeDef]:
    """Nodes that compute an output shape with the batch size of a tensor, int32; the last one is
    the result."""
    name = f"{operation}/open_batch"
    shape = NodeDef(name=f"{name}/shape", op="Shape", input=[source])
    shape.attr["T"].type = dtype
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
    """Dtypes and shapes of the inputs of a network: its input first, then its variables."""
    leaves = {network.input: (network.input_dtype or tf.float32, input_shape)}
    for variable in network.variables:
        leaves[canonical(variable.name)] = (variable.dtype, variable.shape)
    return leaves


def _infer(graph_def: GraphDef, leaves: Mapping[str, Leaf]) -> dict[str, Shape]:
    leaves = {**leaves, SEED: (tf.int32, (2,))}
    leaf_shapes = {name: shape for name, (_, shape) in leaves.items()}
    known = _constant_shapes(graph_def) | leaf_shapes
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
    shapes |= leaf_shapes
    guards.check_ranks(graph_def, shapes)
    return shapes


def _own_name(tensor: tf.Tensor) -> str:
    return tensor.name.removeprefix("n/")


def _placeholders(leaves: Mapping[str, Leaf]) -> dict[str, tf.Tensor]:
    """Create placeholders of these dtypes and shapes in one import; creating them one by one would
    take as long as the rest of shape inference."""
    nodes = []
    for number, (dtype, shape) in enumerate(leaves.values()):
        node = NodeDef(name=f"leaf_{number}", op="Placeholder")
        node.attr["dtype"].type = dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
        nodes.append(node)
    # In older graph versions, a placeholder of rank 0 has unknown rank.
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
    """Reject tensors that would exhaust the memory, individually or in total."""
    total = grown = 0
    for name, shape in shapes.items():
        elements = _num_elements(shape)
        if elements > MAX_ELEMENTS:
            raise ValueError(
                f"tensor {name!r} would have {elements:,} elements, more than "
                f"{MAX_ELEMENTS:,}; the graph is damaged or malicious"
            )
        per_example = elements // batch if shape and shape[0] == batch else elements
        total += per_example
        if per_example > GROWTH * sum(map(_num_elements, made_from[name])):
            grown += per_example
        for kind, number, most in (("", total, MAX_TOTAL), ("filled ", grown, MAX_GROWN)):
            if number > most:
                raise ValueError(
                    f"the {kind}tensors up to {name!r} would have {number:,} elements together, "
                    f"more than {most:,}; the graph is damaged or malicious"
                )


def _num_elements(shape: Shape) -> int:
    return math.prod(size or 1 for size in shape or ())


def _sizes(tensor: tf.Tensor) -> Shape:
    with contextlib.suppress(ValueError):
        return tuple(tensor.shape.as_list())
    return None
