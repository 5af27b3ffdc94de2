"""Where a network can be cut, and what lies on either side: arithmetic, parameters, activations.

Read off the graph; nothing is run, and no weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import Network, canonical, data_inputs, downstream, infer, operation_of
from transfer.images.preprocess import Size

Shape: TypeAlias = tuple[int | None, ...] | None

_CONVOLUTIONS = frozenset({"Conv2D", "DepthwiseConv2dNative", "Conv3D"})
_PRODUCTS = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"})
_POOLS = frozenset({"MaxPool", "MaxPoolV2", "AvgPool", "Mean", "Max"})
# What leaves the numbers as they are: a cut behind it is the cut before it.
_FORM = frozenset({"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "Snapshot"})
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cut:
    """A tensor that separates the input from the tap.

    ``shape`` is that of one example, ``None`` where it is not known, and then so are
    ``multiply_adds``, those of one example up to the tensor, ``share``, the same as a part of all
    (0 to 1), and ``num_bytes``, one example's activations in float32. ``trained`` counts the
    trainable parameters that come after it. ``ends_stage``: it comes out of a pooling or a fully
    connected layer, or is the tap.
    """

    tensor: str
    shape: tuple[int, ...] | None
    multiply_adds: int | None
    share: float | None
    num_bytes: int | None
    trained: int
    ends_stage: bool


def list_cuts(network: Network, image_size: Size | None = None) -> list[Cut]:
    """The cuts worth making, one a layer, from the input to the tap, which comes last.

    Args:
        network: from the input to the tap.
        image_size: where the graph leaves height and width open.
    """
    graphs = [_separating(network, graph_def) for graph_def in network.graphs]
    both = set.intersection(*map(set, graphs))
    shapes = _shapes(network, image_size)
    work = _multiply_adds(network.graph_def, shapes)
    total = None if work is None else sum(work.values())
    by_name = {node.name: node for node in network.graph_def.node}
    layers = _last_of_each_layer(network, [t for t in graphs[0] if t in both], by_name)
    cuts = []
    for tensor in layers:
        before = _upstream(tensor, by_name)
        shape = shapes.get(tensor)
        example = _known(shape and shape[1:])
        done = None if work is None else sum(work.get(name, 0) for name in before)
        trained = [
            math.prod(variable.shape or ())
            for variable in network.variables
            if variable.trainable and variable.name not in before
        ]
        node = by_name[operation_of(tensor)]
        cuts.append(
            Cut(
                tensor=tensor,
                shape=example,
                multiply_adds=done,
                share=done / total if done is not None and total else None,
                num_bytes=None if example is None else math.prod(example) * _FLOAT_BYTES,
                trained=sum(trained),
                ends_stage=node.op in _POOLS
                or (shape is not None and len(shape) == 2)
                or tensor == network.output,
            )
        )
    return cuts


def default_cuts(network: Network, image_size: Size | None = None) -> list[str]:
    """The cuts to compare: the tap, and the last two stages before the fully connected layers."""
    stages = [cut for cut in list_cuts(network, image_size) if cut.ends_stage]
    spatial = [c.tensor for c in stages if c.shape is not None and len(c.shape) == 3]
    # The last pooling has next to no arithmetic behind it: the two before it tell more.
    middle = [tensor for tensor in spatial if tensor != network.output][-3:-1]
    return [network.output, *reversed(middle)]


def last_feature_maps(network: Network, image_size: Size | None = None) -> str | None:
    """The last tensor ``[batch, height, width, channels]`` with more than one place that separates
    the input from the tap and is not pooled: ``relu5_3`` of a VGG16. ``None`` if there is none."""
    shapes = _shapes(network, image_size)
    operations = {node.name: node.op for node in network.graph_def.node}
    for tensor in reversed(_separating(network, network.graph_def)):
        shape = _known(shapes.get(tensor))
        is_pooled = operations[operation_of(tensor)] in _POOLS
        if shape is not None and len(shape) == 4 and shape[1] * shape[2] > 1 and not is_pooled:
            return tensor
    return None


def blocks(network: Network) -> list[list[str]]:
    """Names of all variables by block, from the input to the tap.

    A block ends with a pooling, or before a layer with a stride; each product of matrices, which is
    a fully connected layer, begins its own. VGG16: conv1_*, conv2_*, ..., conv5_*, fc6, fc7.
    """
    names = {variable.name for variable in network.variables}
    found: list[list[str]] = [[]]
    seen: set[str] = set()
    for node in _in_order(network.graph_def):
        reads = [name for e in data_inputs(node) if (name := operation_of(e)) in names - seen]
        begins = (node.op in _PRODUCTS and reads) or max(_strides(node), default=1) > 1
        if begins and node.op not in _POOLS and found[-1]:
            found.append([])
        found[-1] += reads
        seen.update(reads)
        if node.op in _POOLS and found[-1]:
            found.append([])
    return [block for block in found if block]


def stopped(network: Network) -> dict[str, list[str]]:
    """Trainable variables that no gradient of the output reaches, because the graph stops it
    (``tf.stop_gradient``), by the last tensor that does so."""
    graph_def = network.training or network.graph_def
    by_name = {node.name: node for node in graph_def.node}
    names = {variable.name for variable in network.variables if variable.trainable}
    trained, stops = _reached(by_name, [network.output], names)
    found: dict[str, list[str]] = {}
    for stop in sorted(stops, key=list(by_name).index, reverse=True):
        behind, pending = set[str](), [stop]
        while pending:  # what other stops hide belongs to this one, too, if it is nearer
            reached, more = _reached(by_name, data_inputs(by_name[pending.pop()]), names)
            behind |= reached
            pending += more
        mine = behind - trained - {name for others in found.values() for name in others}
        if mine:
            found[f"{stop}:0"] = [v.name for v in network.variables if v.name in mine]
    return found


def _reached(
    by_name: Mapping[str, NodeDef], tensors: Iterable[str], names: Collection[str]
) -> tuple[set[str], set[str]]:
    """Which of some variables gradients of tensors reach, and the nodes that stop them."""
    pending, seen, stops = [operation_of(tensor) for tensor in tensors], set[str](), set[str]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = by_name.get(name)
        if node is not None and node.op == "StopGradient":
            stops.add(name)
        elif node is not None:
            pending += [operation_of(edge) for edge in data_inputs(node)]
    return seen & set(names), stops


def _in_order(graph_def: GraphDef) -> list[NodeDef]:
    return list(graph_def.node)  # a network's nodes come after their inputs


def _separating(network: Network, graph_def: GraphDef) -> list[str]:
    """All tensors through which every way from the input to the output leads, in order.

    After each node in turn, those tensors are looked at that cross over to the nodes to come: where
    there is but one, it separates. What depends on the input only counts.
    """
    live = downstream(graph_def.node, [network.input])
    nodes = [node for node in graph_def.node if node.name in live]
    last_use: dict[str, int] = {network.output: len(nodes)}
    for position, node in enumerate(nodes):
        for edge in data_inputs(node):
            if operation_of(edge) in live or canonical(edge) == network.input:
                last_use.setdefault(canonical(edge), position)
                last_use[canonical(edge)] = max(last_use[canonical(edge)], position)
    outputs: dict[str, list[str]] = {}
    for tensor in last_use:
        outputs.setdefault(operation_of(tensor), []).append(tensor)
    crossing = {network.input} if network.input in last_use else set()
    found: list[str] = []
    ending: dict[int, list[str]] = {}
    for tensor, position in last_use.items():
        ending.setdefault(position, []).append(tensor)
    for position, node in enumerate(nodes):
        crossing.update(outputs.get(node.name, []))
        crossing.difference_update(ending.get(position, []))
        if len(crossing) == 1:
            (tensor,) = crossing
            if tensor not in found[-1:] and tensor != network.input:
                found.append(tensor)
    return found


def _last_of_each_layer(
    network: Network, tensors: Sequence[str], by_name: Mapping[str, NodeDef]
) -> list[str]:
    """Of the tensors after one layer with weights and before the next, the last that changes any
    number; and the output."""
    layer = 0
    layer_of: dict[str, int] = {}
    names = {variable.name for variable in network.variables}
    for node in network.graph_def.node:
        has_weights = any(operation_of(edge) in names for edge in data_inputs(node))
        layer += has_weights and node.op in _CONVOLUTIONS | _PRODUCTS
        layer_of[node.name] = layer
    last: dict[int, str] = {}
    for tensor in tensors:
        number = layer_of[operation_of(tensor)]
        if number and (by_name[operation_of(tensor)].op not in _FORM or number not in last):
            last[number] = tensor
    if layer and network.output != network.input:
        last[layer] = network.output
    return list(last.values())


def _upstream(tensor: str, by_name: Mapping[str, NodeDef]) -> set[str]:
    """Names of the nodes, and of the variables, that a tensor needs."""
    pending, found = [operation_of(tensor)], set[str]()
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            if name in by_name:
                pending += [operation_of(edge) for edge in data_inputs(by_name[name])]
    return found


def _shapes(network: Network, image_size: Size | None) -> dict[str, Shape]:
    """Of one example, as far as TensorFlow can tell."""
    shape = network.input_shape
    sides = (
        (image_size, image_size)
        if image_size is None or isinstance(image_size, int)
        else image_size
    )
    if shape is not None and network.batch_size is None:
        open_sizes = (1, *sides)
        shape = tuple(
            open_sizes[i] if size is None and i < 3 and len(shape) == 4 else size
            for i, size in enumerate(shape)
        )
        shape = (1, *shape[1:])
    elif image_size is not None and shape is None:
        shape = (1, *sides, 3)
    try:
        return infer(replace(network, input_shape=shape))
    except ValueError:
        return {}


def _multiply_adds(graph_def: GraphDef, shapes: Mapping[str, Shape]) -> dict[str, int] | None:
    """Node to its multiply-adds for one example: those of convolutions and matrix products.

    Each number that comes out of a convolution takes as many as its kernel has elements per output
    channel, each of a product as many as there are terms in its sum. ``None`` where a shape is not
    known.
    """
    found = {}
    for node in graph_def.node:
        if node.op not in _CONVOLUTIONS | _PRODUCTS:
            continue
        output = _known(shapes.get(f"{node.name}:0"))
        first, second = (_known(shapes.get(canonical(edge))) for edge in data_inputs(node)[:2])
        if not output or not first or not second:
            return None
        batch = max(1, first[0])
        found[node.name] = math.prod(output) * _terms(node, first, second) // batch
    return found


def _known(shape: Shape) -> tuple[int, ...] | None:
    if shape is None:
        return None
    known = tuple(size for size in shape if size is not None)
    return known if len(known) == len(shape) else None


def _terms(node: NodeDef, first: Sequence[int], second: Sequence[int]) -> int:
    """Products that are added up for one number of the result."""
    if node.op == "DepthwiseConv2dNative":
        return math.prod(second[:2])
    if node.op in _CONVOLUTIONS:
        return math.prod(second[:-1])
    transposed = any(name in node.attr and node.attr[name].b for name in ("transpose_a", "adj_x"))
    return first[-2] if transposed else first[-1]


def _strides(node: NodeDef) -> Sequence[int]:
    # Reading an attribute that is not there adds it.
    return node.attr["strides"].list.i if "strides" in node.attr else ()
