"""Recognize batch norm that a graph composes of elementary operations.

``tf.nn.batch_normalization`` computes ``x * scale + (offset - mean * scale)``, or ``x * scale +
(-mean * scale)`` without an offset. ``scale`` is ``rsqrt(variance + epsilon)``, times gamma if the
graph has one.
"""

from __future__ import annotations

from typing import Any

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import canonical, data_inputs, operation_of
from transfer.layers.native.normalization import batch_norm
from transfer.layers.native.walk import Static, Walk

_SUMS = ("Add", "AddV2")
_COPIES = frozenset({"Identity", "Reshape", "Squeeze"})


def composed_batch_norm(walk: Walk, product: NodeDef, images: Any, scale: Static) -> Any:
    """The output of the batch norm that begins with a product; ``None`` if it is something else.

    Args:
        walk: the network.
        product: node with the product of images and scale.
        images: the images.
        scale: the scale.
    """
    last = walk.reader(product)
    if last is None or last.op not in _SUMS:
        return None
    edges = [canonical(edge) for edge in data_inputs(last)]
    shifts = [edge for edge in edges if operation_of(edge) != product.name]
    if len(shifts) != 1 or operation_of(shifts[0]) in walk.values.live:
        return None
    parts = _Parts(walk)
    shift = parts.of_shift(shifts[0], scale.tensor)
    factor = parts.of_scale(scale.tensor)
    if shift is None or factor is None:
        return None
    (offset, mean), (gamma, variance, epsilon) = shift, factor
    weights = [
        None if name is None else walk.static_of(name) for name in (gamma, offset, mean, variance)
    ]
    return batch_norm(walk, [product, last], images, weights, epsilon)


class _Parts:
    """The operands of static arithmetic."""

    def __init__(self, walk: Walk):
        self._walk = walk
        self._nodes = {node.name: node for node in walk.values.network.graph_def.node}

    def of_shift(self, tensor: str, scale: str) -> tuple[str | None, str] | None:
        """Offset, or ``None``, and mean, from the tensor that is added."""
        offset = None
        difference = self._operands(tensor, "Sub")
        if difference is not None:
            offset, tensor = difference
        factors = self._operands(tensor, "Mul")
        if factors is None or scale not in factors:
            return None
        mean = factors[1 - factors.index(scale)]
        if offset is not None:
            return offset, mean
        negated = self._operands(mean, "Neg")
        return None if negated is None else (None, negated[0])

    def of_scale(self, tensor: str) -> tuple[str | None, str, float] | None:
        """Gamma, or ``None``, variance and epsilon, from the tensor that is multiplied with."""
        gamma, root = None, self._operands(tensor, "Rsqrt")
        for one, other in _both_ways(self._operands(tensor, "Mul")):
            if root is None and (root := self._operands(one, "Rsqrt")) is not None:
                gamma = other
        if root is None:
            return None
        for variance, number in _both_ways(self._operands(root[0], *_SUMS)):
            epsilon = self._walk.number(number)
            if epsilon is not None:
                return gamma, variance, epsilon
        return None

    def _operands(self, tensor: str, *operations: str) -> list[str] | None:
        """What the node that makes a tensor reads, if it is one of these operations."""
        node = self._nodes.get(operation_of(tensor))
        while node is not None and node.op in _COPIES:
            node = self._nodes.get(operation_of(node.input[0]))
        if node is None or node.op not in operations:
            return None
        return [canonical(edge) for edge in data_inputs(node)]


def _both_ways(pair: list[str] | None) -> list[list[str]]:
    return [] if pair is None or len(pair) != 2 else [pair, pair[::-1]]
