"""Any Keras image classifier as a network: the way back from ``to_keras``.

The model is traced for inference, and its graph becomes a ``Network`` like that of a meta graph.
Its weights are shared, not copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import (
    ancestors,
    canonical,
    data_inputs,
    downstream,
    extract,
    free_batch,
    inline,
    operation_of,
)
from transfer.layers.graph_layer import GraphLayer

INPUT = "images"
_COPIES = frozenset({"Identity", "IdentityN"})
_SUMS = frozenset({"Add", "AddV2", "BiasAdd"})
_PRODUCTS = frozenset({"BatchMatMulV2", "Conv2D", "MatMul"})


def network_of(model: keras.Model) -> tuple[GraphLayer, str]:
    """A Keras model as a layer that computes its logits, and the tensor of its features.

    Args:
        model: maps images, or vectors, to one row of numbers each. A softmax at its end is left
            out. It has static sizes.

    Returns:
        The layer, which shares the weights of the model, and the name of the tensor that its last
        matrix product reads (that of the logits, if they are not a matrix product).

    Raises:
        ValueError: if the model has several inputs or outputs, an unknown size, or ends in a
            sigmoid.
        ForbiddenOpError: if it does anything other than arithmetic.
    """
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"model {model.name!r} has {len(model.inputs)} inputs and {len(model.outputs)} "
            "outputs; expected one of each"
        )
    shape = tuple(model.inputs[0].shape)
    if None in shape[1:]:
        raise ValueError(f"model {model.name!r} takes {shape}; expected a known size")
    dtype = tf.as_dtype(model.inputs[0].dtype)
    graph_def, input, output, variables = _traced(model, shape, dtype)
    graph_def = inline(graph_def)
    logits = _before_softmax(graph_def, output)
    network = extract(graph_def, logits, input, dtype, input_shape=(None, *shape[1:]))
    network = free_batch(network)
    layer = GraphLayer(network, variables, name="network")
    return layer, _features(network.graph_def.node, network.output, network.input)


def _traced(
    model: keras.Model, shape: Sequence[int | None], dtype: tf.DType
) -> tuple[GraphDef, str, str, dict[str, keras.Variable]]:
    """The graph of a model, its input, its output, and its variables by their names in it."""
    trained, others = model.trainable_variables, model.non_trainable_variables

    def run(images: tf.Tensor, trained: list[tf.Tensor], others: list[tf.Tensor]) -> tf.Tensor:
        outputs, _ = model.stateless_call(trained, others, images, training=False)
        return outputs

    specs = [[tf.TensorSpec(v.shape, v.dtype) for v in group] for group in (trained, others)]
    function = tf.function(run, autograph=False).get_concrete_function(
        tf.TensorSpec([None, *shape[1:]], dtype), *specs
    )
    graph = function.graph
    arguments = [tensor.op.name for tensor in graph.inputs]
    variables = [*trained, *others]
    given, captured = arguments[: 1 + len(variables)], arguments[1 + len(variables) :]
    taken = {operation.name for operation in graph.get_operations()}
    input, *named = _unique([INPUT, *(variable.path for variable in variables)], taken)
    renamed = dict(zip(given, [input, *named], strict=True))
    constants = dict(zip(captured, function.captured_inputs, strict=True))
    graph_def = GraphDef()
    graph_def.CopyFrom(graph.as_graph_def(add_shapes=True))
    by_name = dict(zip(named, variables, strict=True))
    for node in graph_def.node:
        if node.name in constants:
            _set_constant(node, constants[node.name])
        node.name = renamed.get(node.name, node.name)
        node.input[:] = [_renamed(edge, renamed) for edge in node.input]
        if node.name in by_name:
            _set_variable(node, by_name[node.name])
    return graph_def, input, _renamed(graph.outputs[0].name, renamed), by_name


def _unique(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names, with numbers where they are taken."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        free = next(n for n in itertools.chain([name], numbered) if n not in {*taken, *found})
        found.append(free)
    return found


def _renamed(edge: str, names: dict[str, str]) -> str:
    operation = operation_of(edge)
    return edge.replace(operation, names[operation], 1) if operation in names else edge


def _set_variable(node: NodeDef, variable: keras.Variable) -> None:
    """Turn the placeholder of a weight into a variable."""
    name = node.name
    node.Clear()
    node.name, node.op = name, "VariableV2"
    node.attr["dtype"].type = tf.as_dtype(variable.dtype).as_datatype_enum
    node.attr["shape"].shape.CopyFrom(tf.TensorShape(variable.shape).as_proto())


def _set_constant(node: NodeDef, value: Any) -> None:
    """Turn the placeholder of a tensor that the model holds into a constant."""
    if value.dtype in (tf.resource, tf.variant):
        raise ValueError(
            f"the model reads {node.name!r}, which is neither an input nor one of its weights"
        )
    name = node.name
    node.Clear()
    node.name, node.op = name, "Const"
    node.attr["dtype"].type = value.dtype.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.numpy()))


def _before_softmax(graph_def: GraphDef, output: str) -> str:
    nodes = {node.name: node for node in graph_def.node}
    output = canonical(output)
    tensor = output
    while (node := nodes[operation_of(tensor)]).op in _COPIES and len(data_inputs(node)) == 1:
        tensor = canonical(data_inputs(node)[0])
    if node.op == "Sigmoid":
        raise ValueError(
            "the model ends in a sigmoid, whose outputs are independent; expected logits or a "
            "softmax, with one output per class: train the model with these"
        )
    return canonical(data_inputs(node)[0]) if node.op == "Softmax" else output


def _features(nodes: Sequence[NodeDef], logits: str, input: str) -> str:
    """The tensor that the last matrix product reads, else the logits."""
    by_name = {node.name: node for node in nodes}
    live = downstream(list(ancestors(nodes, logits, stop_at=_leaves(nodes))), [input])
    tensor = canonical(logits)
    while (node := by_name.get(operation_of(tensor))) is not None:
        sources = [
            canonical(edge)
            for edge in data_inputs(node)
            if operation_of(edge) in live or canonical(edge) == input
        ]
        if len(sources) != 1 or node.op not in _COPIES | _SUMS | _PRODUCTS:
            break
        if node.op in _PRODUCTS:
            return sources[0]
        tensor = sources[0]
    return canonical(logits)


def _leaves(nodes: Sequence[NodeDef]) -> set[str]:
    """Tensors that no node makes."""
    names = {node.name for node in nodes}
    edges = {canonical(edge) for node in nodes for edge in data_inputs(node)}
    return {edge for edge in edges if operation_of(edge) not in names}
