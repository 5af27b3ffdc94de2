"""Detect preprocessing inside a graph: mean subtraction, scaling, swapped color channels.

Many programs have it in their graph. Preprocessing the images outside would then repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import Network, canonical, constant, data_inputs, operation_of
from transfer.images.preprocess import Convention, convention

_LAYERS = frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"})
_FORM = frozenset(
    {
        *("Cast", "Identity", "Pad", "PadV2", "Reshape", "ExpandDims", "Squeeze"),
        *("ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"),
    }
)
_SPLITS = frozenset({"Split", "SplitV", "Unpack"})
_MIN_MEAN = 0.05  # smaller values are an epsilon


@dataclass(frozen=True)
class Preparation:
    """Preprocessing in a graph: ``means`` are subtracted and images multiplied by ``scales``, in
    the order of the graph, one number or one per channel; ``swaps``: red and blue are swapped."""

    means: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    swaps: bool = False

    def __bool__(self) -> bool:
        return bool(self.means or self.scales or self.swaps)

    def __str__(self) -> str:
        parts = []
        if self.means:
            parts.append(f"subtracts {', '.join(f'{mean:g}' for mean in self.means)}")
        if self.scales:
            parts.append(f"multiplies by {', '.join(f'{scale:.4g}' for scale in self.scales)}")
        if self.swaps:
            parts.append("swaps red and blue")
        return " and ".join(parts)

    def repeats(self, mode: str | Mapping[str, Any]) -> str | None:
        """The steps that preprocessing in this mode would repeat; ``None`` if there are none."""
        meaning = convention(mode)
        twice = []
        if self.means and any(meaning.mean):
            twice.append("subtract a mean")
        if self.swaps and meaning.bgr:
            twice.append("swap red and blue")
        if self.scales and _shrinks(meaning) and min(map(abs, self.scales)) < 1:
            twice.append("scale")
        return " and ".join(twice) or None


def find(network: Network) -> Preparation:
    """Find the preprocessing of a network before its first layer with weights."""
    by_name = {node.name: node for node in network.graph_def.node}
    weights = {variable.name for variable in network.variables}
    shallow = {operation_of(network.input)}
    means: list[float] = []
    scales: list[float] = []
    swaps = False
    for node in network.graph_def.node:
        edges = [canonical(edge) for edge in data_inputs(node)]
        if not any(operation_of(edge) in shallow for edge in edges) or node.op in _LAYERS:
            continue
        others = [operation_of(edge) for edge in edges if operation_of(edge) not in shallow]
        if any(name in weights for name in others):
            continue  # a layer with weights
        values = [_constant(by_name, name) for name in others]
        number = next((v for v in values if v is not None and v.size in (1, 3)), None)
        picture = next((v for v in values if v is not None and v.ndim > 1 and v.size > 3), None)
        if node.op in ("Sub", "Add", "AddV2", "BiasAdd") and (number is not None):
            sign = 1 if node.op == "Sub" else -1
            means += [sign * float(v) for v in number.ravel() if abs(float(v)) > _MIN_MEAN]
        elif node.op == "Sub" and picture is not None:
            means.append(float(picture.mean()))  # a mean image
        elif node.op in ("Mul", "Div", "RealDiv") and number is not None:
            factors = number.ravel().astype(float)
            factors = factors if node.op == "Mul" else 1 / factors
            scales += [float(factor) for factor in factors if factor != 1]
        elif node.op in ("ReverseV2", "GatherV2", "StridedSlice"):
            swaps = swaps or _reverses(node, values)
        elif node.op in ("Concat", "ConcatV2", "Pack"):
            order = [_channel(by_name, edge) for edge in edges if operation_of(edge) in shallow]
            swaps = swaps or (None not in order and order == [2, 1, 0])
        elif node.op not in _FORM | _SPLITS:
            continue  # for example an activation: the search ends here
        shallow.add(node.name)
    return Preparation(tuple(means), tuple(scales), swaps)


def _shrinks(convention: Convention) -> bool:
    return any(scale != 1 for scale in convention.scale)


def _constant(by_name: dict[str, Any], name: str) -> np.ndarray | None:
    """The value of a constant, possibly reshaped or cast."""
    for _ in range(5):
        node = by_name.get(name)
        if node is None or node.op not in ("Cast", "ExpandDims", "Identity", "Reshape"):
            return constant(node)
        name = operation_of(canonical(data_inputs(node)[0]))
    return None


def _reverses(node: NodeDef, values: list[np.ndarray | None]) -> bool:
    """Whether the constants of an operation reverse the last axis."""
    known = [value.ravel().tolist() for value in values if value is not None]
    if node.op == "GatherV2":
        return [2, 1, 0] in known
    if node.op == "ReverseV2":
        return known in ([[-1]], [[3]])
    if not known:
        return False
    strides = known[-1]
    reaches_colours = bool(node.attr["ellipsis_mask"].i) or len(strides) == 4
    return reaches_colours and strides[-1] == -1


def _channel(by_name: dict[str, Any], edge: str) -> int | None:
    """Index of the color channel in a tensor: the output index of a split, or start of a slice."""
    for _ in range(20):
        name, index = edge.split(":")[0], edge.partition(":")[2] or "0"
        node = by_name.get(name)
        if node is None:
            return None
        if node.op in _SPLITS:
            return int(index)
        edges = data_inputs(node)
        if node.op == "StridedSlice":
            begin = constant(by_name.get(operation_of(canonical(edges[1]))))
            return None if begin is None else int(begin.ravel()[-1])
        inputs = [e for e in edges if constant(by_name.get(operation_of(e))) is None]
        if len(inputs) != 1:
            return None
        edge = canonical(inputs[0])
    return None
