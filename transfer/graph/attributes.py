"""Validate the attributes of allowed operations before TensorFlow sees them.

Kernels, and some shape functions, crash the process on abnormal attributes: a stride of 0 divides
by zero, a dilation of 2^31 fails a ``CHECK``. TensorFlow's op definitions state only types and a
few minimums; the ranges here are those of real networks with a wide margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.core.framework.node_def_pb2 import NodeDef

MAX_WINDOW = 2**16
"""Maximum size of a kernel, stride or padding, in pixels."""
MAX_RANK = 8
"""Maximum rank of a tensor; TensorFlow's kernels support at most eight dimensions."""
MAX_DIM = 2**31 - 1
MAX_COUNT = 10_000
"""Maximum number of inputs or outputs of a node."""

_Range = tuple[float, float]
_INT32 = (-(2**31), 2**31 - 1)
_AXIS = (-MAX_RANK - 1, MAX_RANK)
_WINDOW = (1, MAX_WINDOW)
_RANGES: dict[str, _Range] = {
    "N": (1, MAX_COUNT),
    "axis": _AXIS,
    "batch_dims": (-MAX_RANK, MAX_RANK),
    "block_size": (2, MAX_WINDOW),
    "depth_radius": (0, MAX_WINDOW),
    "dilations": _WINDOW,
    "explicit_paddings": (0, MAX_WINDOW),
    "k": (0, MAX_DIM),
    "ksize": _WINDOW,
    "ksizes": _WINDOW,
    "num": (0, MAX_COUNT),
    "num_bits": (2, 16),
    "num_partitions": (1, MAX_COUNT),
    "num_split": (1, MAX_COUNT),
    "pooling_ratio": _WINDOW,
    "rates": _WINDOW,
    "squeeze_dims": _AXIS,
    "strides": _WINDOW,
}
_ANY_INT64 = frozenset({"seed", "seed2"})
_PER_DIMENSION = frozenset({"dilations", "ksize", "ksizes", "pooling_ratio", "rates", "strides"})
_FLAT = """
    AvgPool Conv2D Conv2DBackpropInput DepthwiseConv2dNative Dilation2D ExtractImagePatches
    FractionalAvgPool MaxPool MaxPoolWithArgmax
"""
_SOLID = "AvgPool3D Conv3D MaxPool3D"
_RANKS = {**dict.fromkeys(_FLAT.split(), 4), **dict.fromkeys(_SOLID.split(), 5)}


def check(node: NodeDef) -> None:
    """Reject a node with an attribute outside the range of real networks.

    Raises:
        ValueError: with the node, the attribute, its value and the range.
    """
    for name, value in node.attr.items():
        if name.startswith("_"):
            continue
        if value.WhichOneof("value") == "list":
            numbers: Sequence[float] = [*value.list.i, *value.list.f]
            shapes = value.list.shape
        else:
            numbers = [getattr(value, kind) for kind in ("i", "f") if value.HasField(kind)]
            shapes = [value.shape] if value.HasField("shape") else []
        low, high = _RANGES.get(name, (-math.inf, math.inf) if name in _ANY_INT64 else _INT32)
        if name in _RANGES or not _is_real(value):
            bad = [number for number in numbers if not low <= number <= high]
            if bad:
                raise ValueError(
                    f"the graph is damaged: {node.name!r} ({node.op}) has {name} {bad[0]}; "
                    f"expected {low:,} to {high:,}"
                )
        for shape in shapes:
            _check_shape(node, name, [dim.size for dim in shape.dim])
    if node.op in _RANKS:
        _check_lengths(node, _RANKS[node.op])
    if "data_format" in node.attr and node.attr["data_format"].s == b"NCHW_VECT_C":
        raise ValueError(
            f"the graph takes images as NCHW_VECT_C ({node.name!r}, {node.op}), which only GPUs "
            "compute"
        )


def _is_real(value: AttrValue) -> bool:
    """Whether the value is a float or a list of floats, which are not restricted."""
    return value.HasField("f") or bool(value.list.f)


def _check_shape(node: NodeDef, name: str, sizes: Sequence[int]) -> None:
    if len(sizes) > MAX_RANK or any(not -1 <= size <= MAX_DIM for size in sizes):
        raise ValueError(
            f"the graph is damaged: {node.name!r} ({node.op}) has {name} {list(sizes)[:10]}; "
            f"expected at most {MAX_RANK} dimensions of at most {MAX_DIM:,}"
        )


def _check_lengths(node: NodeDef, rank: int) -> None:
    """Check that list attributes, such as strides, have one element per dimension, if present."""
    for name in _PER_DIMENSION & set(node.attr):
        length = len(node.attr[name].list.i) + len(node.attr[name].list.f)
        if length != rank and (length or name != "dilations"):
            raise ValueError(
                f"the graph is damaged: {node.name!r} ({node.op}) has {length} {name}; expected "
                f"{rank}, one per dimension"
            )
    paddings = node.attr["explicit_paddings"].list.i if "explicit_paddings" in node.attr else []
    expected = 2 * rank if "padding" in node.attr and node.attr["padding"].s == b"EXPLICIT" else 0
    if len(paddings) != expected:
        raise ValueError(
            f"the graph is damaged: {node.name!r} ({node.op}) has {len(paddings)} "
            f"explicit_paddings; expected {expected}"
        )
