"""Tensors of a network that do not depend on the content of the images: weights and shapes.

They are evaluated with two batch sizes, which shows which of them depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import (
    SEED,
    Network,
    ancestors,
    canonical,
    data_inputs,
    downstream,
    find_dropout,
    operation_of,
)
from transfer.graph.trials import checked_graph

DROPOUT = "Dropout"
"""Operation of the node that replaces a dropout: inputs are its source, the tensor with its rate or
keep probability, and the tensor with its random numbers."""
KEPT = "kept"
"""Attribute of such a node: whether the second input is the keep probability."""
BATCHES = (2, 3)
SCALED = "scaled"
"""Attribute of such a node: whether the kept values are divided by the keep probability."""
_OF_SHAPE = frozenset({"OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"})


@dataclass
class Values:
    """The nodes of a network, with dropout as one node, and everything static about them.

    ``live`` are the operations that depend on the content of the images, ``random`` those that
    depend on random numbers, ``trained`` those that depend on variables. ``static`` maps tensors to
    their values, and ``shapes`` live tensors to their shapes, for each size in ``BATCHES``.
    """

    network: Network
    example: tuple[int, ...]
    weights: Sequence[tf.Tensor]
    nodes: list[NodeDef]
    live: set[str]
    random: set[str]
    trained: set[str]
    static: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def shape(self, tensor: str) -> tuple[int | None, ...]:
        """The shape of a live tensor, with ``None`` for dimensions that depend on the batch."""
        first, second = self.shapes[tensor]
        if len(first) != len(second):
            return (None,) * len(first)
        return tuple(a if a == b else None for a, b in zip(first, second, strict=True))

    def rows(self, tensor: str) -> bool:
        """Whether a live tensor has one row per image."""
        return tuple(shape[:1] for shape in self.shapes[tensor]) == tuple((b,) for b in BATCHES)

    def variables_of(self, tensor: str) -> set[str]:
        """The variables that a static tensor depends on."""
        names = set(_names(self.network))
        if tensor in names:
            return {tensor}
        leaves = [*names, SEED, self.network.input]
        nodes = ancestors(self.network.graph_def.node, tensor, stop_at=leaves)
        return names & {canonical(edge) for node in nodes for edge in data_inputs(node)}

    def add(self, tensor: str) -> None:
        """Evaluate another static tensor."""
        self.static[tensor] = tuple(
            _evaluate(
                self.network, _images(self.network, (batch, *self.example)), self.weights, [tensor]
            )[0].numpy()
            for batch in BATCHES
        )

    def derived(self, tensors: Sequence[str], variables: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Static tensors as a differentiable function of the values of the variables."""
        images = _images(self.network, (BATCHES[0], *self.example))
        known = dict(zip(_names(self.network), variables, strict=True))
        wanted = [tensor for tensor in tensors if tensor not in known]
        if wanted:
            known |= zip(wanted, _evaluate(self.network, images, variables, wanted), strict=True)
        return [known[tensor] for tensor in tensors]


def values_of(network: Network, example: tuple[int, ...], variables: Sequence[tf.Tensor]) -> Values:
    """Evaluate a network on two batches.

    Args:
        network: the network; its graph for training is used, in which dropout is not bypassed.
        example: shape of one image.
        variables: values of its variables, in order.

    Raises:
        ValueError: if it does not accept images of this shape.
    """
    network = replace(network, graph_def=network.training or network.graph_def, training=None)
    nodes = _with_dropout_nodes(network)
    live = _live(nodes, network.input)
    names = _names(network)
    trained = downstream(nodes, names) | {operation_of(name) for name in names}
    values = Values(network, example, variables, nodes, live, _live(nodes, SEED), trained)
    read = {canonical(e) for node in nodes if node.name in live for e in data_inputs(node)}
    read |= {*map(canonical, network.outputs)}
    known = dict(zip(names, variables, strict=True))
    live_tensors = [tensor for tensor in read if operation_of(tensor) in live]
    static = [t for t in read if t not in known and t != network.input and t not in live_tensors]
    for batch in BATCHES:
        images = _images(network, (batch, *example))
        shapes = [*live_tensors, *_masks(nodes)]
        results = _evaluate(network, images, variables, static, shapes)
        for tensor, value in zip(static, results, strict=False):
            values.static[tensor] = (*values.static.get(tensor, ()), value.numpy())
        for tensor, shape in zip(shapes, results[len(static) :], strict=True):
            values.shapes[tensor] = (
                *values.shapes.get(tensor, ()),
                tuple(map(int, shape.numpy())),
            )
    for tensor, value in known.items():
        values.static[tensor] = (np.asarray(value),) * len(BATCHES)
    values.shapes[network.input] = tuple((batch, *example) for batch in BATCHES)
    return values


def _with_dropout_nodes(network: Network) -> list[NodeDef]:
    leaves = [network.input, SEED, *_names(network)]
    nodes = list(network.graph_def.node)
    live = downstream(nodes, [network.input]) | {operation_of(network.input)}
    replaced, by_name = {}, {node.name: node for node in nodes}
    for dropout in find_dropout(nodes, live):
        node = NodeDef(name=dropout.node, op=DROPOUT)
        node.input[:] = [dropout.source, dropout.amount, dropout.uniform]
        node.attr[KEPT].b = dropout.control == "keep_prob"
        read = map(canonical, by_name[dropout.node].input)
        node.attr[SCALED].b = canonical(dropout.source) not in read
        replaced[dropout.node] = node
    return ancestors([replaced.get(n.name, n) for n in nodes], network.outputs, stop_at=leaves)


def _masks(nodes: Sequence[NodeDef]) -> list[str]:
    return [canonical(node.input[2]) for node in nodes if node.op == DROPOUT]


def _live(nodes: Sequence[NodeDef], input: str) -> set[str]:
    """Operations that depend on the content of the input, not only on its shape."""
    live: set[str] = set()
    for node in nodes:  # in topological order
        edges = data_inputs(node)[: 1 if node.op == DROPOUT else None]
        if node.op not in _OF_SHAPE and any(
            canonical(edge) == input or operation_of(edge) in live for edge in edges
        ):
            live.add(node.name)
    return live


def _names(network: Network) -> list[str]:
    return [canonical(variable.name) for variable in network.variables]


def _images(network: Network, shape: tuple[int, ...]) -> tf.Tensor:
    return tf.zeros(shape, network.input_dtype or tf.float32)


def _evaluate(
    network: Network,
    images: tf.Tensor,
    variables: Sequence[tf.Tensor],
    tensors: Sequence[str],
    shapes: Sequence[str] = (),
) -> list[tf.Tensor]:
    """The values of ``tensors``, followed by the shapes of the tensors in ``shapes``."""
    names = _names(network)
    wanted = [*tensors, *shapes]

    def run(images: tf.Tensor, variables: list[tf.Tensor]) -> list[tf.Tensor]:
        specs = [tf.TensorSpec(value.shape, value.dtype) for value in (images, *variables)]
        graph_def = checked_graph(network, specs[0], specs[1:])
        inputs = {network.input: images, **dict(zip(names, variables, strict=True))}
        inputs[SEED] = tf.zeros([2], tf.int32)
        used = {canonical(edge) for node in graph_def.node for edge in node.input}
        results = tf.graph_util.import_graph_def(
            graph_def,
            input_map={name: tf.identity(t) for name, t in inputs.items() if name in used},
            return_elements=wanted,
            name="values",
        )
        return [*results[: len(tensors)], *map(tf.shape, results[len(tensors) :])]

    values = list(variables)
    function = tf.function(run, autograph=False).get_concrete_function(images, values)
    return list(function(images, values))
