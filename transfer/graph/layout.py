"""Convert networks from channels first (``NCHW``), common in GPU programs, to channels last (NHWC).

TensorFlow does not support NCHW pooling and convolution gradients on CPUs, and this library uses
channels last throughout. Tensors with height and width keep their names and are transposed; layout
agnostic operations, such as flattening, get their operand in the graph's original layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.graph_def import (
    canonical,
    constant,
    downstream,
    dtype_of,
    operation_of,
    with_nodes,
)
from transfer.graph.network import Network
from transfer.graph.shapes import Shape, infer

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Operation type to the index of its operand that is an image.
_WITH_FORMAT = {
    **dict.fromkeys(("AvgPool", "BiasAdd", "Conv2D", "DepthToSpace", "DepthwiseConv2dNative"), 0),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "MaxPool"), 0),
    **dict.fromkeys(("MaxPoolV2", "SpaceToDepth"), 0),
    "Conv2DBackpropInput": 2,
}
_LISTS = ("dilations", "ksize", "strides")
_UNARY = frozenset(
    """
    Abs Cast CheckNumerics ClipByValue Elu Erf Exp FakeQuantWithMinMaxArgs Identity LeakyRelu Log
    Neg PreventGradient Relu Relu6 Rsqrt Selu Sigmoid Snapshot Softplus Softsign Sqrt Square
    StopGradient Tanh ZerosLike OnesLike
    """.split()  # noqa: SIM905
)
_NARY = frozenset(
    """
    Add AddN AddV2 Div Maximum Minimum Mul Pow RealDiv Select SelectV2 SquaredDifference Sub
    """.split()  # noqa: SIM905
)
_REDUCTIONS = frozenset({"Max", "Mean", "Min", "Prod", "Sum"})
_PADS = frozenset({"MirrorPad", "Pad", "PadV2"})


def is_channels_first(shape: Shape) -> bool:
    """Whether images of this shape are ``[batch, channels, height, width]``."""
    return shape is not None and len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)


def channels_last(network: Network) -> Network:
    """Convert a network to channels last, including its input and output.

    A network without channels-first tensors is returned unchanged.

    Raises:
        ValueError: if the graph is not valid for its own input.
    """
    converts_input = is_channels_first(network.input_shape)
    has_format = any(_is_first(node) for g in network.graphs for node in g.node)
    if not converts_input and not has_format:
        return network
    graphs, shape = [], network.input_shape
    for graph_def in network.graphs:
        shapes = infer(replace(network, graph_def=graph_def, training=None))
        graphs.append(_LayoutConverter(graph_def, network, shapes).run())
    if converts_input and shape is not None:
        shape = tuple(shape[axis] for axis in _TO_LAST)
    return replace(
        network,
        graph_def=graphs[0],
        training=graphs[1] if graphs[1:] else None,
        input_shape=shape,
    )


@dataclass
class _LayoutConverter:
    """A graph during conversion. ``last`` are tensors already converted to channels last; ``first``
    tensors known to be still channels first."""

    graph_def: GraphDef
    network: Network
    shapes: dict[str, Shape]
    nodes: list[NodeDef] = field(default_factory=list)
    last: set[str] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    made: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self) -> GraphDef:
        if is_channels_first(self.network.input_shape):
            self.last.add(self.network.input)
        self.counts = Counter(map(operation_of, self.shapes))
        self.constants = {n.name: n for n in self.graph_def.node if n.op == "Const"}
        live = downstream(self.graph_def.node, [self.network.input])
        for node in self.graph_def.node:
            copy = NodeDef()
            copy.CopyFrom(node)
            if node.name not in live:
                self.nodes.append(copy)
            elif not self._convert(copy):
                self._add_unchanged(copy)
        for output in dict.fromkeys(self.network.outputs):
            self._convert_output(output)
        return with_nodes(self.graph_def, self.nodes)

    def _rank(self, tensor: str) -> int | None:
        shape = self.shapes.get(canonical(tensor))
        return None if shape is None else len(shape)

    def _add_unchanged(self, node: NodeDef) -> None:
        """Add an operation unchanged, with its operands in the original layout."""
        edges = [canonical(edge) for edge in node.input]
        was_first = any(edge in self.last | self.first for edge in edges)
        node.input[:] = [self._as_first(edge) for edge in edges]
        self.nodes.append(node)
        if was_first and node.op not in ("Reshape", "Transpose"):
            self.first |= {tensor for tensor in self._outputs(node) if self._rank(tensor) == 4}

    def _convert(self, node: NodeDef) -> bool:
        """Add an operation converted to channels last, if it can be converted."""
        edges = [canonical(edge) for edge in node.input]
        is_last = [edge in self.last for edge in edges]
        if _is_first(node):
            return self._convert_format(node, edges)
        if node.op == "Transpose" and len(edges) == 2:
            return self._convert_transpose(node, edges)
        if not any(is_last):
            return False
        if node.op in _UNARY:
            pass
        elif node.op in _NARY:
            if any(self._rank(edge) not in (0, 4) for edge in edges):
                return False
            node.input[:] = [self._as_last(e) if self._rank(e) == 4 else e for e in edges]
        elif node.op == "ConcatV2":
            axis = self._constant(edges[-1])
            if axis is None or any(self._rank(edge) != 4 for edge in edges[:-1]):
                return False
            node.input[:] = [
                *map(self._as_last, edges[:-1]),
                self._add_constant(f"{node.name}/channels_last/axis", _TO_FIRST[int(axis) % 4]),
            ]
            node.attr["Tidx"].type = tf.int32.as_datatype_enum
        elif node.op == "Split" and is_last[1]:
            axis = self._constant(edges[0])
            if axis is None:
                return False
            node.input[0] = self._add_constant(
                f"{node.name}/channels_last/axis", _TO_FIRST[int(axis) % 4]
            )
        elif node.op in _PADS and is_last[0]:
            paddings = self._constant(edges[1])
            if paddings is None or paddings.shape != (4, 2):
                return False
            node.input[1] = self._add_constant(
                f"{node.name}/channels_last/paddings", paddings[list(_TO_LAST)]
            )
            node.attr["Tpaddings"].type = tf.int32.as_datatype_enum
        elif node.op in _REDUCTIONS and is_last[0]:
            axes = self._constant(edges[1])
            if axes is None or not node.attr["keep_dims"].b:
                return False
            axes = np.asarray([_TO_FIRST[int(axis) % 4] for axis in axes.ravel()])
            node.input[1] = self._add_constant(f"{node.name}/channels_last/axes", axes)
            node.attr["Tidx"].type = tf.int32.as_datatype_enum
        else:
            return False
        self.nodes.append(node)
        self.last.update(self._outputs(node))
        return True

    def _convert_format(self, node: NodeDef, edges: Sequence[str]) -> bool:
        place = _WITH_FORMAT.get(node.op)
        if place is None or self._rank(edges[place]) not in (None, 2, 4):
            return False
        node.attr["data_format"].s = b"NHWC"
        if self._rank(edges[place]) == 2:  # BiasAdd of vectors
            self.nodes.append(node)
            return True
        node.input[place] = self._as_last(edges[place])
        for name in _LISTS:
            if name in node.attr and len(node.attr[name].list.i) == 4:
                values = list(node.attr[name].list.i)
                node.attr[name].list.i[:] = [values[axis] for axis in _TO_LAST]
        if "explicit_paddings" in node.attr and len(node.attr["explicit_paddings"].list.i) == 8:
            pairs = np.reshape(list(node.attr["explicit_paddings"].list.i), (4, 2))
            node.attr["explicit_paddings"].list.i[:] = pairs[list(_TO_LAST)].ravel().tolist()
        size_inputs = {"MaxPoolV2": (1, 2), "Conv2DBackpropInput": (0,)}.get(node.op, ())
        for number in size_inputs:
            node.input[number] = self._reordered(edges[number])
        self.nodes.append(node)
        self.last.add(f"{node.name}:0")
        return True

    def _convert_transpose(self, node: NodeDef, edges: Sequence[str]) -> bool:
        """Replace a transpose between the two layouts by an identity."""
        value = self._constant(edges[1])
        order = None if value is None else tuple(value.ravel().tolist())
        is_last = edges[0] in self.last
        if not (order == _TO_FIRST and not is_last) and not (order == _TO_LAST and is_last):
            return False
        identity = NodeDef(name=node.name, op="Identity", input=[edges[0]])
        identity.attr["T"].CopyFrom(node.attr["T"])
        self.nodes.append(identity)
        if order == _TO_FIRST:
            self.last.add(f"{node.name}:0")
        return True

    def _convert_output(self, output: str) -> None:
        """Transpose an output to channels last if its operation was not converted."""
        if output not in self.first or self._rank(output) != 4:
            return
        name, _, index = output.rpartition(":")
        if index != "0":
            return
        maker = next(node for node in self.nodes if node.name == name)
        maker.name = f"{name}/channels_first"
        for node in self.nodes:
            node.input[:] = [
                f"{maker.name}:0" if canonical(edge) == output else edge for edge in node.input
            ]
        self._transpose(name, f"{maker.name}:0", _TO_LAST, maker)

    def _as_last(self, tensor: str) -> str:
        return tensor if tensor in self.last else self._other(tensor, "channels_last", _TO_LAST)

    def _as_first(self, tensor: str) -> str:
        if tensor not in self.last:
            return tensor
        return self._other(tensor, "channels_first", _TO_FIRST)

    def _other(self, tensor: str, layout: str, order: Sequence[int]) -> str:
        key = (tensor, layout)
        if key not in self.made:
            name, _, index = tensor.rpartition(":")
            self.made[key] = self._transpose(f"{name}/{layout}_{index}", tensor, order, None)
        return self.made[key]

    def _transpose(self, name: str, tensor: str, order: Sequence[int], like: NodeDef | None) -> str:
        node = NodeDef(name=name, op="Transpose", input=[tensor])
        node.input.append(self._add_constant(f"{name}/order", np.asarray(order)))
        node.attr["T"].type = self._type(tensor, like)
        node.attr["Tperm"].type = tf.int32.as_datatype_enum
        self.nodes.append(node)
        return f"{name}:0"

    def _type(self, tensor: str, like: NodeDef | None) -> int:
        maker = like or next((n for n in self.nodes if n.name == operation_of(tensor)), None)
        of_variables = {known.name: known.dtype for known in self.network.variables}
        dtype = of_variables.get(operation_of(tensor), self.network.input_dtype)
        dtype = dtype if maker is None else dtype_of(maker)
        return (dtype or tf.float32).as_datatype_enum

    def _reordered(self, sizes: str) -> str:
        """Reorder a list with one number per axis to channels last."""
        name = f"{operation_of(sizes)}/channels_last"
        if all(node.name != name for node in self.nodes):
            node = NodeDef(name=name, op="GatherV2", input=[sizes])
            node.input.append(self._add_constant(f"{name}/order", np.asarray(_TO_LAST)))
            node.input.append(self._add_constant(f"{name}/axis", 0))
            for key, dtype in (("Tparams", tf.int32), ("Tindices", tf.int32), ("Taxis", tf.int32)):
                node.attr[key].type = dtype.as_datatype_enum
            self.nodes.append(node)
        return f"{name}:0"

    def _add_constant(self, name: str, value: Any) -> str:
        """Add an int32 constant."""
        node = NodeDef(name=name, op="Const")
        node.attr["dtype"].type = tf.int32.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.int32))
        self.nodes.append(node)
        return f"{name}:0"

    def _constant(self, tensor: str) -> np.ndarray | None:
        return constant(self.constants.get(operation_of(tensor)))

    def _outputs(self, node: NodeDef) -> list[str]:
        count = self.counts.get(node.name, 1)
        return [f"{node.name}:{number}" for number in range(count)]


def _is_first(node: NodeDef) -> bool:
    return "data_format" in node.attr and node.attr["data_format"].s == b"NCHW"
