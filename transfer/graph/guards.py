"""Guard operations that crash the process if an input has an unexpected rank or size.

If shape inference knows the shapes, it rejects invalid ones. Otherwise the shape is checked when
the graph runs: by an ``EnsureShape`` for the rank, and by a ``Slice`` of the whole tensor, which
fails if a dimension is smaller than a window.

Shape inference itself crashes the process if it reads the values of an input of the wrong rank. The
ranks of such inputs are therefore checked before it (``check_ranks``) or in it (``with_ranks``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_INT64

from transfer.core.private_api import find_op_def
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
"""Operation type to the ranks of its inputs; ``None`` means any rank."""
_READ_IN_PART = frozenset({"Conv2DBackpropInput"})
"""Operations whose shape function checks the rank of the sizes input, and reads known elements."""
_SIZED_BY_VALUE = """
    Bincount BroadcastTo CropAndResize Fill LinSpace MatrixDiagV2 MatrixDiagV3 MirrorPad Multinomial
    OneHot Pad PadV2 RandomStandardNormal RandomUniform RandomUniformInt Range ResizeArea
    ResizeBicubic ResizeBilinear ResizeNearestNeighbor ScaleAndTranslate ScatterNd SpaceToBatch
    SpaceToBatchND StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform
    StatelessRandomUniformInt StatelessRandomUniformV2 StatelessTruncatedNormal Tile TruncatedNormal
    UnsortedSegmentSum
"""
SIZED_BY_VALUE = frozenset(_SIZED_BY_VALUE.split())
"""Operations whose output size is determined by the value of an input."""


def ranks_of(node: NodeDef) -> tuple[int | None, ...]:
    """The required ranks of an operation's inputs; empty if all are allowed."""
    if node.op == "FusedBatchNormV3":
        layout = node.attr["data_format"].s if "data_format" in node.attr else b""
        return (5 if layout in (b"NDHWC", b"NCDHW") else 4, *_NORM[1:])
    return RANKS.get(node.op, ())


def check_ranks(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> None:
    """Reject an operation with an input of the wrong rank.

    Raises:
        ValueError: with the node, the input, its shape and the expected rank.
    """
    for node, number, rank in _ranked_inputs(graph_def):
        shape = shapes.get(canonical(node.input[number]))
        if shape is not None and len(shape) != rank:
            dimensions = "1 dimension" if rank == 1 else f"{rank} dimensions"
            argument = find_op_def(node.op).input_arg[number].name
            raise ValueError(
                f"the graph is damaged: {node.name!r} ({node.op}) gets {node.input[number]!r} of "
                f"shape {list(shape)} as its {argument}; expected {dimensions}"
            )


def with_ranks(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> GraphDef:
    """The graph for shape inference, with checks of ranks that become known only during inference.

    Only inputs of rank 0 to 2 are checked, whose values shape functions may read; ``shapes`` are
    the shapes known before.
    """
    checks: dict[str, list[tuple[int, list[NodeDef]]]] = {}
    for node, number, rank in _ranked_inputs(graph_def):
        known = shapes.get(canonical(node.input[number])) is not None
        if rank < 3 and not known and node.op not in _READ_IN_PART:
            checks.setdefault(node.name, []).append((number, [_ensure_rank(node, number, rank)]))
    if not checks:
        return graph_def
    return _with_checks(graph_def, checks)


def _ranked_inputs(graph_def: GraphDef) -> Iterator[tuple[NodeDef, int, int]]:
    """Each input with a required rank: its node, its index and the rank."""
    for node in graph_def.node:
        ranks = ranks_of(node)
        if ranks:
            inputs = range(len(data_inputs(node)))
            for number, rank in zip(inputs, ranks, strict=False):
                if rank is not None:
                    yield node, number, rank


def unproven(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> list[str]:
    """Nodes not proven safe by the shapes: unknown rank or size of an input, or unknown output
    size."""
    lacking = {node.name for node, *_ in _lacking(graph_def, shapes)}
    return [
        node.name
        for node in graph_def.node
        if node.name in lacking
        or (node.op in SIZED_BY_VALUE and not _is_known(shapes.get(f"{node.name}:0")))
    ]


def with_guards(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> GraphDef:
    """The graph with run-time checks of inputs whose shapes are unknown."""
    guards: dict[str, list[tuple[int, list[NodeDef]]]] = {}
    for node, number, rank in _lacking(graph_def, shapes):
        guards.setdefault(node.name, []).append((number, _guards(node, number, rank)))
    return _with_checks(graph_def, guards)


def _lacking(
    graph_def: GraphDef, shapes: Mapping[str, Shape]
) -> Iterator[tuple[NodeDef, int, int]]:
    """The inputs with a required rank whose shapes are unknown."""
    for node, number, rank in _ranked_inputs(graph_def):
        if not _is_known(shapes.get(canonical(node.input[number]))):
            yield node, number, rank


def _with_checks(
    graph_def: GraphDef, checks: Mapping[str, Sequence[tuple[int, Sequence[NodeDef]]]]
) -> GraphDef:
    """Insert nodes before inputs of nodes; the last inserted node replaces the input."""
    nodes: list[NodeDef] = []
    for node in graph_def.node:
        copy = NodeDef()
        copy.CopyFrom(node)
        for number, added in checks.get(node.name, ()):
            nodes += added
            copy.input[number] = added[-1].name
        nodes.append(copy)
    return with_nodes(graph_def, nodes)


def _is_known(shape: Shape) -> bool:
    return shape is not None and None not in shape


def _guards(node: NodeDef, number: int, rank: int) -> list[NodeDef]:
    """Nodes that forward an input if it has this rank and sizes that the operation accepts."""
    ranked = _ensure_rank(node, number, rank)
    prefix, dtype = ranked.name.rpartition("/")[0], ranked.attr["T"].type
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


def _ensure_rank(node: NodeDef, number: int, rank: int) -> NodeDef:
    name = f"{node.name}/guard_{number}/ranked"
    ranked = NodeDef(name=name, op="EnsureShape", input=[node.input[number]])
    ranked.attr["T"].type = _input_type(node, number)
    ranked.attr["shape"].shape.SetInParent()
    for _ in range(rank):
        ranked.attr["shape"].shape.dim.add(size=-1)
    return ranked


def _least(node: NodeDef, number: int, rank: int) -> Sequence[int]:
    """Minimum sizes of an input; the batch may be empty."""
    least = [1] * rank
    is_valid = "padding" in node.attr and node.attr["padding"].s == b"VALID"
    for name in ("ksize", "ksizes"):
        if name in node.attr and is_valid and number == 0:
            least = [max(size, 1) for size in node.attr[name].list.i]
    if number == (2 if node.op == "Conv2DBackpropInput" else 0):
        least[0] = 0
    return least


def _input_type(node: NodeDef, number: int) -> int:
    """The dtype of an input of one of these operations."""
    op_def = find_op_def(node.op)
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
