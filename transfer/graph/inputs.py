"""Find tensors that can be fed with images if the graph's own data source cannot.

After a JPEG decoder, a ``map_fn`` or a split of the batch there is a tensor with images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import (
    VARIABLES,
    Network,
    canonical,
    data_inputs,
    downstream,
    dtype_of,
    infer,
    is_channels_first,
    operation_of,
    split_tensor_name,
    static_shape,
)

_SPLITS = frozenset({"Slice", "Split", "SplitV", "StridedSlice", "Unpack"})
_BATCHES = (12, 16, 20, 28)
"""Batch sizes such that each number of towers up to 8 divides one of them."""
_MADE_UP = frozenset({"Const", "Placeholder", "PlaceholderWithDefault", "Fill"}) | VARIABLES


def candidates(nodes: Sequence[NodeDef], output: str, known: Iterable[str] = ()) -> list[str]:
    """Tensors that an output depends on and that look like images, most likely first.

    Tensors with static height and width come first, then those closest to the data source. Tensors
    inside loops are excluded, outputs of loops are not.

    Args:
        nodes: the nodes of a graph.
        output: the tensor to compute.
        known: tensors to exclude because they have been tried.
    """
    by_name = {node.name: node for node in nodes}
    distance = {operation_of(output): 0}
    pending = [operation_of(output)]
    tensors: dict[str, int] = {}
    for name in pending:  # breadth-first search; the list grows during iteration
        for edge in data_inputs(by_name[name]) if name in by_name else ():
            operation = operation_of(edge)
            if operation not in distance:
                distance[operation] = distance[name] + 1
                pending.append(operation)
            tensors[canonical(edge)] = distance[operation]
    ranked = []
    for tensor, steps in tensors.items():
        operation, index = split_tensor_name(tensor)
        node = by_name.get(operation)
        if node is None or tensor in set(known):
            continue
        if node.op in _MADE_UP or _reads_variable(by_name, tensor):
            continue  # not images, or the output of a layer
        shape, dtype = static_shape(node, index), dtype_of(node, index)
        if dtype is not None and not (dtype.is_floating or dtype.is_integer):
            continue
        if shape is None or len(shape) != 4:
            continue
        if shape[3] in (1, 3) or is_channels_first(shape):
            ranked.append((None in shape[1:], -steps, tensor))
    return [tensor for _, _, tensor in sorted(ranked)]


def _reads_variable(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    pending, seen = [operation_of(tensor)], set[str]()
    while pending:
        node = by_name.get(pending.pop())
        if node is None or node.name in seen:
            continue
        if node.op in VARIABLES:
            return True
        seen.add(node.name)
        pending += [operation_of(edge) for edge in data_inputs(node)]
    return False


def shared_batch(network: Network) -> tuple[Fraction, list[str]] | None:
    """If towers split the batch: the number of output rows per image, and the tensors with the
    towers' parts. ``None`` if there is one row per image, or this cannot be determined."""
    by_name = {node.name: node for node in network.graph_def.node}
    live = downstream(network.graph_def.node, [network.input])

    def splits(node: NodeDef | None) -> bool:
        if node is None or node.op not in _SPLITS or node.name not in live:
            return False
        source = by_name.get(operation_of(_split_one(node)))
        return source is None or source.op not in ("Shape", "ShapeN")

    parts = dict.fromkeys(
        canonical(edge)
        for node in network.graph_def.node
        for edge in data_inputs(node)
        if splits(by_name.get(operation_of(edge)))
    )
    if not parts or not network.input_shape:
        return None
    for batch in _BATCHES if network.batch_size is None else (network.batch_size,):
        try:
            shapes = infer(replace(network, input_shape=(batch, *network.input_shape[1:])))
        except ValueError:
            continue
        rows = {name: shape[0] if shape else None for name, shape in shapes.items()}
        counts = [count for name in network.outputs if (count := rows[name]) not in (None, batch)]
        if not counts:
            return None
        count = counts[0]
        tower_inputs = [
            part
            for part in parts
            if rows[canonical(_split_one(by_name[operation_of(part)]))] == batch
            and rows[part] == count
        ]
        return (Fraction(count or 0, batch), tower_inputs) if tower_inputs else None
    return None


def _split_one(node: NodeDef) -> str:
    """The input that an operation splits or slices."""
    return data_inputs(node)[1 if node.op == "Split" else 0]
