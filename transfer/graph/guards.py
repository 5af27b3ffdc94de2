"""Operations that end the process where an input has a rank or size that they do not expect.

Where shape inference knows the shapes, it refuses those that do not fit. Where it does not, the
shape is checked when the graph runs: by an ``EnsureShape`` for the rank, and by a ``Slice`` of the
whole tensor, which fails where a dimension is smaller than a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_INT64
from tensorflow.python.framework import op_def_registry

from transfer.graph.graph_def import canonical, data_inputs, with_nodes

Shape = tuple[int | None, ...] | None

_NORM = (4, 1, 1, 1, 1)
_RESIZE = (4, 1)
RANKS: dict[str, tuple[int | None, ...]] = {
    "AvgPool": (4,),
    "AvgPool3D": (5,),
    "BatchNormWithGlobalNormalization": _NORM,
    "BatchToSpace": (4, 2),
    "Conv2D": (4, 4),
    "Conv2DBackpropInput": (1, 4, 4),
    "Conv3D": (5, 5),
    "CropAndResize": (4, 2, 1, 1),
    "DepthToSpace": (4,),
    "DepthwiseConv2dNative": (4, 4),
    "Dilation2D": (4, 3),
    "ExtractImagePatches": (4,),
    "FractionalAvgPool": (4,),
    "FusedBatchNorm": _NORM,
    "FusedBatchNormV2": _NORM,
    "LRN": (4,),
    "MaxPool": (4,),
    "MaxPool3D": (5,),
    "MaxPoolV2": (4, 1, 1),
    "MaxPoolWithArgmax": (4,),
    "ResizeArea": _RESIZE,
    "ResizeBicubic": _RESIZE,
    "ResizeBilinear": _RESIZE,
    "ResizeNearestNeighbor": _RESIZE,
    "ScaleAndTranslate": (4, 1, 1, 1),
    "SpaceToBatch": (4, 2),
    "SpaceToDepth": (4,),
    "SplitV": (None, 1, 0),
}
"""Operation to the ranks of its inputs; ``None`` is any."""
_SIZED_BY_VALUE = """
    Bincount BroadcastTo CropAndResize Fill LinSpace MatrixDiagV2 MatrixDiagV3 MirrorPad Multinomial
    OneHot Pad PadV2 RandomStandardNormal RandomUniform RandomUniformInt Range ResizeArea
    ResizeBicubic ResizeBilinear ResizeNearestNeighbor ScaleAndTranslate ScatterNd SpaceToBatch
    SpaceToBatchND StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform
    StatelessRandomUniformInt StatelessRandomUniformV2 StatelessTruncatedNormal Tile TruncatedNormal
    UnsortedSegmentSum
"""
SIZED_BY_VALUE = frozenset(_SIZED_BY_VALUE.split())
"""Operations whose output is as large as the value of an input says."""


def ranks_of(node: NodeDef) -> tuple[int | None, ...]:
    """The ranks that an operation demands of its inputs; empty if it takes any."""
    if node.op == "FusedBatchNormV3":
        layout = node.attr["data_format"].s if "data_format" in node.attr else b""
        return (5 if layout in (b"NDHWC", b"NCDHW") else 4, *_NORM[1:])
    return RANKS.get(node.op, ())


def unproven(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> list[str]:
    """Nodes of which the shapes do not show that they run: by rank, size of an input, or memory."""
    return [
        node.name
        for node in graph_def.node
        if any(
            rank is not None and _lacks(node, number, shapes)
            for number, rank in enumerate(ranks_of(node))
        )
        or (node.op in SIZED_BY_VALUE and not _is_known(shapes.get(f"{node.name}:0")))
    ]


def with_guards(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> GraphDef:
    """The graph with checks before the inputs whose shapes are not known."""
    nodes: list[NodeDef] = []
    for node in graph_def.node:
        copy = NodeDef()
        copy.CopyFrom(node)
        for number, rank in enumerate(ranks_of(node)):
            if rank is not None and _lacks(node, number, shapes):
                guards = _guards(node, number, rank)
                nodes += guards
                copy.input[number] = guards[-1].name
        nodes.append(copy)
    return with_nodes(graph_def, nodes)


def _lacks(node: NodeDef, number: int, shapes: Mapping[str, Shape]) -> bool:
    edges = data_inputs(node)
    return number < len(edges) and not _is_known(shapes.get(canonical(edges[number])))


def _is_known(shape: Shape) -> bool:
    return shape is not None and None not in shape


def _guards(node: NodeDef, number: int, rank: int) -> list[NodeDef]:
    """Nodes that pass an input on if it has that rank, and sizes that the operation can take."""
    prefix = f"{node.name}/guard_{number}"
    dtype = _input_type(node, number)
    ranked = NodeDef(name=f"{prefix}/ranked", op="EnsureShape", input=[node.input[number]])
    ranked.attr["T"].type = dtype
    for _ in range(rank):
        ranked.attr["shape"].shape.dim.add(size=-1)
    if rank < 3:
        return [ranked]
    sizes = NodeDef(name=f"{prefix}/sizes", op="Shape", input=[ranked.name])
    sizes.attr["T"].type, sizes.attr["out_type"].type = dtype, DT_INT64
    least = _constant(f"{prefix}/least", _least(node, number, rank))
    needed = NodeDef(name=f"{prefix}/needed", op="Maximum", input=[sizes.name, least.name])
    needed.attr["T"].type = DT_INT64
    begin = _constant(f"{prefix}/begin", [0] * rank)
    whole = NodeDef(
        name=f"{prefix}/whole", op="Slice", input=[ranked.name, begin.name, needed.name]
    )
    whole.attr["T"].type, whole.attr["Index"].type = dtype, DT_INT64
    return [ranked, sizes, least, needed, begin, whole]


def _least(node: NodeDef, number: int, rank: int) -> Sequence[int]:
    """The smallest sizes of an input; the batch may be empty."""
    least = [1] * rank
    is_valid = "padding" in node.attr and node.attr["padding"].s == b"VALID"
    for name in ("ksize", "ksizes"):
        if name in node.attr and is_valid and number == 0:
            least = [max(size, 1) for size in node.attr[name].list.i]
    if number == (2 if node.op == "Conv2DBackpropInput" else 0):
        least[0] = 0
    return least


def _input_type(node: NodeDef, number: int) -> int:
    """The element type of an input of one of these operations."""
    op_def = op_def_registry.get(node.op)
    argument = op_def.input_arg[number]
    if not argument.type_attr:
        return argument.type
    if argument.type_attr in node.attr:
        return node.attr[argument.type_attr].type
    defaults = {attr.name: attr.default_value.type for attr in op_def.attr}
    return defaults[argument.type_attr]


def _constant(name: str, values: Sequence[int]) -> NodeDef:
    node = NodeDef(name=name, op="Const")
    node.attr["dtype"].type = DT_INT64
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(values), tf.int64))
    return node
