"""Automatic mixed precision: convolutions and matrix products in bfloat16 or float16.

Follows the rules of TensorFlow's graph optimizer ``auto_mixed_precision``, which itself is of
limited use here: it knows float16 on GPUs only and bfloat16 on CPUs only, and it rewrites all
functions of the process, the head and its loss included. A rewritten network gives the same on
every device, and only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.core.private_api import find_op_def
from transfer.graph.graph_def import (
    ancestors,
    canonical,
    data_inputs,
    downstream,
    operation_of,
    split_tensor_name,
    with_nodes,
)
from transfer.graph.network import Network
from transfer.graph.randomness import SEED

_PRODUCTS = frozenset(
    {
        "BatchMatMul",
        "BatchMatMulV2",
        "Conv2D",
        "Conv2DBackpropInput",  # a transposed convolution
        "DepthwiseConv2dNative",
        "MatMul",
    }
)
"""Operations that hardware computes faster in lower precision: they are always rewritten."""
_FOLLOWERS = frozenset(
    {
        "Add",
        "AddV2",
        "AvgPool",
        "BatchToSpaceND",
        "BiasAdd",
        "ConcatV2",
        "ExpandDims",
        "FusedBatchNormV2",
        "FusedBatchNormV3",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "Maximum",
        "Mul",
        "Pad",
        "Relu",
        "Relu6",
        "Reshape",
        "Shape",
        "SpaceToBatchND",
        "Squeeze",
        "StopGradient",
        "Sub",
        "Transpose",
    }
)
"""Operations rewritten where their operands are results of ``_PRODUCTS`` or weights. All others,
such as sums over the image, exponentials and local response normalization, stay in float32."""


def in_mixed_precision(network: Network, dtype: tf.DType) -> Network:
    """A network that computes convolutions and matrix products in a lower precision.

    Weights, input and outputs stay in float32, under the same names; casts are added where the
    precision changes.

    Args:
        network: the network; it is not changed.
        dtype: ``tf.bfloat16`` or ``tf.float16``.
    """
    graphs = [_rewritten(network, graph_def, dtype) for graph_def in network.graphs]
    return replace(network, graph_def=graphs[0], training=graphs[1] if graphs[1:] else None)


def num_products(network: Network) -> int:
    """Number of convolutions and matrix products in float32, which ``in_mixed_precision`` rewrites.

    Those of weights only are not counted, and not rewritten.
    """
    after_input = downstream(network.graph_def.node, [network.input])
    return sum(_is_product(node) and node.name in after_input for node in network.graph_def.node)


def _rewritten(network: Network, graph_def: GraphDef, dtype: tf.DType) -> GraphDef:
    """The graph in mixed precision: a node ``x`` that is rewritten becomes ``x/bfloat16``, and its
    cast to float32, named ``x``."""
    after_input = downstream(graph_def.node, [network.input])
    read_beyond_first = {
        operation_of(edge)
        for edge in [*network.outputs, *(e for node in graph_def.node for e in data_inputs(node))]
        if split_tensor_name(edge)[1] > 0
    }
    suffix = _free_suffix(graph_def, dtype.name)
    low: dict[str, str] = {}  # tensors in float32 to the same in the lower precision
    results: set[str] = set()  # those of them that are computed in it
    nodes: list[NodeDef] = []

    def lowered(tensor: str) -> str:
        tensor = canonical(tensor)
        if tensor not in low:
            name = f"{tensor.replace(':', '_')}/to_{suffix}"
            nodes.append(_cast(name, tensor, tf.float32, dtype))
            low[tensor] = f"{name}:0"
        return low[tensor]

    def is_rewritten(node: NodeDef) -> bool:
        if node.name in read_beyond_first or node.name not in after_input:
            return False
        if _is_product(node):
            return True
        if node.op not in _FOLLOWERS or not _is_float32(node):
            return False
        operands = [canonical(node.input[position]) for position in _operands(node)]
        varying = [t for t in operands if t == network.input or operation_of(t) in after_input]
        return bool(varying) and results.issuperset(varying)

    for node in graph_def.node:  # in topological order
        if not is_rewritten(node):
            nodes.append(node)
            continue
        copy = NodeDef()
        copy.CopyFrom(node)
        copy.attr["T"].type = dtype.as_datatype_enum
        for position in _operands(node):
            copy.input[position] = lowered(node.input[position])
        nodes.append(copy)
        if node.op != "Shape":  # whose result is not of this type
            copy.name = f"{node.name}/{suffix}"
            nodes.append(_cast(node.name, copy.name, dtype, tf.float32))
            low[f"{node.name}:0"] = f"{copy.name}:0"
            results.add(f"{node.name}:0")
    leaves = [network.input, SEED, *(variable.name for variable in network.variables)]
    return with_nodes(graph_def, ancestors(nodes, network.outputs, stop_at=leaves))


def _is_product(node: NodeDef) -> bool:
    return node.op in _PRODUCTS and _is_float32(node)


def _is_float32(node: NodeDef) -> bool:
    if "T" in node.attr:  # attributes with default values may be left out
        return node.attr["T"].type == tf.float32.as_datatype_enum
    op_def = find_op_def(node.op)
    types = [] if op_def is None else [a.default_value.type for a in op_def.attr if a.name == "T"]
    return types == [tf.float32.as_datatype_enum]


def _operands(node: NodeDef) -> Iterator[int]:
    """The positions of the inputs whose type is the attribute ``T``."""
    position = 0
    op_def = find_op_def(node.op)
    for argument in () if op_def is None else op_def.input_arg:
        count = node.attr[argument.number_attr].i if argument.number_attr else 1
        if argument.type_attr == "T":
            yield from range(position, position + count)
        position += count


def _cast(name: str, tensor: str, source: tf.DType, target: tf.DType) -> NodeDef:
    node = NodeDef(name=name, op="Cast", input=[tensor])
    node.attr["SrcT"].type = source.as_datatype_enum
    node.attr["DstT"].type = target.as_datatype_enum
    return node


def _free_suffix(graph_def: GraphDef, suffix: str) -> str:
    while any(node.name.endswith((f"/{suffix}", f"/to_{suffix}")) for node in graph_def.node):
        suffix += "_"
    return suffix
