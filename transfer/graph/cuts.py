"""List where a network can be cut, with multiply-adds, parameters and activation sizes of each cut.

Computed from the graph by shape inference; nothing is run, and no weights are needed.
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
# Operations that do not change values: a cut after them is equivalent to the cut before.
_FORM = frozenset({"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "Snapshot"})
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cut:
    """A tensor that separates the input from the tap.

    ``shape`` is the shape per example, ``multiply_adds`` the multiply-adds per example up to the
    tensor, ``share`` their fraction of the total (0 to 1), ``num_bytes`` the size of the float32
    activations per example; all are ``None`` if shapes are unknown. ``trained`` counts the
    trainable parameters after the tensor. ``ends_stage``: it is the output of a pooling or fully
    connected layer, or the tap.
    """

    tensor: str
    shape: tuple[int, ...] | None
    multiply_adds: int | None
    share: float | None
    num_bytes: int | None
    trained: int
    ends_stage: bool


def list_cuts(network: Network, image_size: Size | None = None) -> list[Cut]:
    """The useful cuts, one per layer, from the input to the tap, which is the last one.

    Args:
        network: network from the input to the tap.
        image_size: used if the graph does not fix height and width.
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
    """The cuts to compare by default: the tap, and the last two stages before the fully connected
    layers."""
    stages = [cut for cut in list_cuts(network, image_size) if cut.ends_stage]
    spatial = [c.tensor for c in stages if c.shape is not None and len(c.shape) == 3]
    # After the last pooling there is hardly any computation: the two before it are more useful.
    middle = [tensor for tensor in spatial if tensor != network.output][-3:-1]
    return [network.output, *reversed(middle)]


def last_feature_maps(network: Network, image_size: Size | None = None) -> str | None:
    """The last feature maps ``[batch, height, width, channels]`` that separate the input from the
    tap, are larger than 1x1 and not pooled: ``relu5_3`` of VGG16. ``None`` if there are none."""
    shapes = _shapes(network, image_size)
    operations = {node.name: node.op for node in network.graph_def.node}
    for tensor in reversed(_separating(network, network.graph_def)):
        shape = _known(shapes.get(tensor))
        is_pooled = operations[operation_of(tensor)] in _POOLS
        if shape is not None and len(shape) == 4 and shape[1] * shape[2] > 1 and not is_pooled:
            return tensor
    return None


def blocks(network: Network) -> list[list[str]]:
    """Names of all variables grouped by block, from the input to the tap.

    A block ends after a pooling layer or before a strided layer; each fully connected layer (matrix
    product) starts a new block. VGG16: conv1_*, conv2_*, ..., conv5_*, fc6, fc7.
    """
    names = {variable.name for variable in network.variables}
    groups: list[list[str]] = [[]]
    seen: set[str] = set()
    for node in _in_order(network.graph_def):
        reads = [name for e in data_inputs(node) if (name := operation_of(e)) in names - seen]
        begins = (node.op in _PRODUCTS and reads) or max(_strides(node), default=1) > 1
        if begins and node.op not in _POOLS and groups[-1]:
            groups.append([])
        groups[-1] += reads
        seen.update(reads)
        if node.op in _POOLS and groups[-1]:
            groups.append([])
    return [block for block in groups if block]


def stages(network: Network) -> dict[str, list[str]]:
    """The names of the cuts that end a stage, from the input to the tap, each with the names of the
    variables between the cut before it and itself. VGG16: pool1, ..., pool5, fc6, fc7."""
    by_name = {node.name: node for node in network.graph_def.node}
    names = [variable.name for variable in network.variables]
    seen: set[str] = set()
    found = {}
    for cut in list_cuts(network):
        if cut.ends_stage:
            before = _upstream(cut.tensor, by_name)
            found[cut.tensor.removesuffix(":0")] = [n for n in names if n in before - seen]
            seen |= before
    return found


def stopped(network: Network) -> dict[str, list[str]]:
    """Trainable variables that receive no gradient because of a ``tf.stop_gradient`` in the graph,
    grouped by the last tensor that stops it."""
    graph_def = network.training or network.graph_def
    by_name = {node.name: node for node in graph_def.node}
    names = {variable.name for variable in network.variables if variable.trainable}
    trained, stops = _reached(by_name, network.outputs, names)
    by_stop: dict[str, list[str]] = {}
    for stop in sorted(stops, key=list(by_name).index, reverse=True):
        behind, pending = set[str](), [stop]
        while pending:  # variables behind further stops belong to the one nearest to the output
            reached, more = _reached(by_name, data_inputs(by_name[pending.pop()]), names)
            behind |= reached
            pending += more
        mine = behind - trained - {name for others in by_stop.values() for name in others}
        if mine:
            by_stop[f"{stop}:0"] = [v.name for v in network.variables if v.name in mine]
    return by_stop


def _reached(
    by_name: Mapping[str, NodeDef], tensors: Iterable[str], names: Collection[str]
) -> tuple[set[str], set[str]]:
    """The variables that gradients of ``tensors`` reach, and the nodes that stop gradients."""
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
    return list(graph_def.node)  # a network's nodes are in topological order


def _separating(network: Network, graph_def: GraphDef) -> list[str]:
    """All tensors on every path from the input to the outputs, in topological order.

    After each node, the tensors used by later nodes are determined: if there is only one, it
    separates. Only tensors that depend on the input are considered.
    """
    live = downstream(graph_def.node, [network.input])
    nodes = [node for node in graph_def.node if node.name in live]
    last_use = dict.fromkeys(network.outputs, len(nodes))
    for position, node in enumerate(nodes):
        for edge in data_inputs(node):
            if operation_of(edge) in live or canonical(edge) == network.input:
                last_use.setdefault(canonical(edge), position)
                last_use[canonical(edge)] = max(last_use[canonical(edge)], position)
    outputs: dict[str, list[str]] = {}
    for tensor in last_use:
        outputs.setdefault(operation_of(tensor), []).append(tensor)
    crossing = {network.input} if network.input in last_use else set()
    separating: list[str] = []
    ending: dict[int, list[str]] = {}
    for tensor, position in last_use.items():
        ending.setdefault(position, []).append(tensor)
    for position, node in enumerate(nodes):
        crossing.update(outputs.get(node.name, []))
        crossing.difference_update(ending.get(position, []))
        if len(crossing) == 1:
            (tensor,) = crossing
            if tensor not in separating[-1:] and tensor != network.input:
                separating.append(tensor)
    return separating


def _last_of_each_layer(
    network: Network, tensors: Sequence[str], by_name: Mapping[str, NodeDef]
) -> list[str]:
    """For each layer with weights, the last tensor before the next such layer that changes values;
    and the output."""
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
    if layer and {*network.outputs} == {network.output} != {network.input}:
        last[layer] = network.output
    return list(last.values())


def _upstream(tensor: str, by_name: Mapping[str, NodeDef]) -> set[str]:
    """Names of the nodes and variables that a tensor depends on."""
    pending, upstream = [operation_of(tensor)], set[str]()
    while pending:
        name = pending.pop()
        if name not in upstream:
            upstream.add(name)
            if name in by_name:
                pending += [operation_of(edge) for edge in data_inputs(by_name[name])]
    return upstream


def _shapes(network: Network, image_size: Size | None) -> dict[str, Shape]:
    """Shapes of all tensors for one example, as far as they can be inferred."""
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
    """Node name to multiply-adds per example, of convolutions and matrix products.

    An output value of a convolution takes as many as its kernel has elements per output channel, an
    output value of a matrix product as many as its sum has terms. ``None`` if a shape is unknown.
    """
    counts = {}
    for node in graph_def.node:
        if node.op not in _CONVOLUTIONS | _PRODUCTS:
            continue
        output = _known(shapes.get(f"{node.name}:0"))
        first, second = (_known(shapes.get(canonical(edge))) for edge in data_inputs(node)[:2])
        if not output or not first or not second:
            return None
        batch = max(1, first[0])
        counts[node.name] = math.prod(output) * _terms(node, first, second) // batch
    return counts


def _known(shape: Shape) -> tuple[int, ...] | None:
    if shape is None:
        return None
    known = tuple(size for size in shape if size is not None)
    return known if len(known) == len(shape) else None


def _terms(node: NodeDef, first: Sequence[int], second: Sequence[int]) -> int:
    """Number of products summed for one output value."""
    if node.op == "DepthwiseConv2dNative":
        return math.prod(second[:2])
    if node.op in _CONVOLUTIONS:
        return math.prod(second[:-1])
    transposed = any(name in node.attr and node.attr[name].b for name in ("transpose_a", "adj_x"))
    return first[-2] if transposed else first[-1]


def _strides(node: NodeDef) -> Sequence[int]:
    # Reading a missing attribute would add it.
    return node.attr["strides"].list.i if "strides" in node.attr else ()
