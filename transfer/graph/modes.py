"""Detect placeholders that switch between training and inference, by the operations they feed.

TensorFlow 1 programs feed a ``keep_prob`` and an ``is_training``, often without a meaningful name
(``Placeholder_2``) and without a shape. They are recognized by their use in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import conditionals, dropout
from transfer.graph.graph_def import (
    SWITCHES,
    VARIABLES,
    constant,
    data_inputs,
    downstream,
    dtype_of,
    operation_of,
    origin,
    static_shape,
    uses_batch_statistics,
)
from transfer.graph.policy import RANDOM_OPS

TRAINING_KEEP_PROB = 0.5
"""Used to train VGG (arXiv 1409.1556, section 3.1), and by nearly all programs."""

_PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderV2", "PlaceholderWithDefault"})
_PASS = SWITCHES | {"Cast", "Identity", "Reshape", "Squeeze", "ReadVariableOp"}


@dataclass(frozen=True)
class Mode:
    """A placeholder or variable that switches between training and inference, with its values.

    ``why`` is the node by which it was recognized.
    """

    tensor: str
    kind: Literal["keep_prob", "rate", "is_training"]
    inference: float | bool
    training: float | bool
    why: str


def find(nodes: Sequence[NodeDef], input: str | None) -> list[Mode]:
    """Find all mode switches.

    Args:
        nodes: all nodes that a tap depends on, in topological order.
        input: the tensor that takes the images; it is excluded.
    """
    by_name = {node.name: node for node in nodes}
    live = {operation_of(input), *downstream(nodes, [input])} if input else set(by_name)
    modes: dict[str, Mode] = {}
    for place in dropout.find(nodes, live):
        for leaf, kind in _controls(by_name, place):
            value = 1.0 if kind == "keep_prob" else 0.0
            modes.setdefault(
                leaf.name,
                Mode(
                    f"{leaf.name}:0", kind, value, _training_value(by_name, leaf, kind), place.node
                ),
            )
    trains = _training_sides(nodes, by_name)
    for node in nodes:
        if node.name not in modes and _is_switch(node) and f"{node.name}:0" != input:
            training, why = trains.get(node.name, (True, "a switch that is on or off"))
            mode = Mode(f"{node.name}:0", "is_training", not training, training, why)
            modes[node.name] = mode
    return list(modes.values())


def _controls(
    by_name: Mapping[str, NodeDef], place: dropout.Dropout
) -> list[tuple[NodeDef, dropout.Control]]:
    """The placeholders that control a dropout, each with its meaning."""
    controls = []
    pending: list[tuple[str, dropout.Control]] = [(place.amount, place.control)]
    for _ in range(50):
        if not pending:
            break
        tensor, control = pending.pop()
        node = origin(by_name, tensor, _PASS)
        if node is None:
            continue
        edges = data_inputs(node)
        is_number = node.op in VARIABLES and not node.attr["shape"].shape.dim
        if node.op in _PLACEHOLDERS or is_number:
            controls.append((node, control))
        elif node.op == "Sub" and len(edges) == 2:  # 1 - keep_prob
            flipped: dropout.Control = "rate" if control == "keep_prob" else "keep_prob"
            pending.append((edges[1], flipped))
        elif node.op in conditionals.MERGES:
            pending += [(edge, control) for edge in edges]
    return controls


def _training_value(by_name: Mapping[str, NodeDef], leaf: NodeDef, kind: dropout.Control) -> float:
    """The placeholder's default value if it is between 0 and 1, else the customary value."""
    default = by_name.get(operation_of(leaf.input[0])) if leaf.input else None
    value = constant(default)
    if value is not None and value.size == 1 and value.dtype.kind == "f" and 0 < value.item() < 1:
        return float(value.item())
    return TRAINING_KEEP_PROB if kind == "keep_prob" else 1 - TRAINING_KEEP_PROB


def _is_switch(node: NodeDef) -> bool:
    """Whether a node is a boolean scalar placeholder or variable."""
    if node.op not in _PLACEHOLDERS | VARIABLES or dtype_of(node) != tf.bool:
        return False
    # The handle of a variable is always a scalar, whatever the shape of its value.
    return not (node.attr["shape"].shape.dim if node.op in VARIABLES else static_shape(node))


def _training_sides(
    nodes: Sequence[NodeDef], by_name: Mapping[str, NodeDef]
) -> dict[str, tuple[bool, str]]:
    """For each switch, the value that means training, inferred from the branches that it selects.

    Training generates random numbers and uses batch statistics; inference does neither.
    """
    sides: dict[str, tuple[bool, str]] = {}
    lives = conditionals.branches(nodes)
    for node in nodes:
        in_training = node.op in RANDOM_OPS or (
            node.op in conditionals.NORMS and uses_batch_statistics(node)
        )
        if not in_training and node.op in conditionals.MERGES:
            # Moving averages are read directly from a variable; batch statistics are computed.
            predicate = conditionals.predicate_of(node, by_name, lives)
            stored = [_is_variable(by_name, edge) for edge in data_inputs(node)]
            if predicate is not None and stored in ([True, False], [False, True]):
                _vote(sides, by_name, predicate, stored.index(False), node.name)
        elif in_training:
            for predicate, side in lives[node.name].items():
                _vote(sides, by_name, predicate, side, node.name)
    return sides


def _vote(
    sides: dict[str, tuple[bool, str]],
    by_name: Mapping[str, NodeDef],
    predicate: str,
    side: int,
    why: str,
) -> None:
    value = bool(side)
    node = origin(by_name, predicate, _PASS)
    while node is not None and node.op == "LogicalNot":
        value = not value
        node = origin(by_name, node.input[0], _PASS)
    if node is not None:
        sides.setdefault(node.name, (value, why))


def _is_variable(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    node = origin(by_name, tensor, _PASS)
    return node is not None and node.op in VARIABLES
