"""Placeholders that tell training from inference, recognised by what they feed.

Programs of TensorFlow 1 feed a ``keep_prob`` and an ``is_training``; often these have no name
(``Placeholder_2``) and no shape. What a placeholder feeds says what it is.
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
)
from transfer.graph.policy import RANDOM_OPS

TRAINING_KEEP_PROB = 0.5
"""What VGG was trained with (arXiv 1409.1556, section 3.1), and what nearly all programs feed."""

_PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderV2", "PlaceholderWithDefault"})
_PASS = SWITCHES | {"Cast", "Identity", "Reshape", "Squeeze", "ReadVariableOp"}


@dataclass(frozen=True)
class Mode:
    """A placeholder, or a variable, that tells training from inference, and what to feed it.

    ``why`` names the node by which it was recognised.
    """

    tensor: str
    kind: Literal["keep_prob", "rate", "is_training"]
    inference: float | bool
    training: float | bool
    why: str


def find(nodes: Sequence[NodeDef], input: str | None) -> list[Mode]:
    """All of them among nodes.

    Args:
        nodes: all that a tap depends on, inputs before their users.
        input: the tensor that takes the images; it is none of them.
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
    """The placeholders that say how much is dropped, each with what it means."""
    found = []
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
            found.append((node, control))
        elif node.op == "Sub" and len(edges) == 2:  # 1 - keep_prob
            flipped: dropout.Control = "rate" if control == "keep_prob" else "keep_prob"
            pending.append((edges[1], flipped))
        elif node.op in conditionals.MERGES:
            pending += [(edge, control) for edge in edges]
    return found


def _training_value(by_name: Mapping[str, NodeDef], leaf: NodeDef, kind: dropout.Control) -> float:
    """The placeholder's default, if it drops something; else what is customary."""
    default = by_name.get(operation_of(leaf.input[0])) if leaf.input else None
    value = constant(default)
    if value is not None and value.size == 1 and value.dtype.kind == "f" and 0 < value.item() < 1:
        return float(value.item())
    return TRAINING_KEEP_PROB if kind == "keep_prob" else 1 - TRAINING_KEEP_PROB


def _is_switch(node: NodeDef) -> bool:
    """Whether a node is one truth value from outside of the graph, or one that is kept in it."""
    if node.op not in _PLACEHOLDERS | VARIABLES or dtype_of(node) != tf.bool:
        return False
    # The handle of a variable is a scalar whatever it holds.
    return not (node.attr["shape"].shape.dim if node.op in VARIABLES else static_shape(node))


def _training_sides(
    nodes: Sequence[NodeDef], by_name: Mapping[str, NodeDef]
) -> dict[str, tuple[bool, str]]:
    """For each switch, which value means training, by what lies in the branches that it chooses.

    Training draws random numbers and takes the statistics of the batch; inference does neither.
    """
    found: dict[str, tuple[bool, str]] = {}
    lives = conditionals.branches(nodes)
    for node in nodes:
        in_training = node.op in RANDOM_OPS or (
            node.op.startswith("FusedBatchNorm") and node.attr["is_training"].b
        )
        if not in_training and node.op in conditionals.MERGES:
            # The learnt statistics come straight from a variable; those of the batch do not.
            predicate = conditionals.predicate_of(node, by_name, lives)
            stored = [_is_variable(by_name, edge) for edge in data_inputs(node)]
            if predicate is not None and stored in ([True, False], [False, True]):
                _vote(found, by_name, predicate, stored.index(False), node.name)
        elif in_training:
            for predicate, side in lives[node.name].items():
                _vote(found, by_name, predicate, side, node.name)
    return found


def _vote(
    found: dict[str, tuple[bool, str]],
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
        found.setdefault(node.name, (value, why))


def _is_variable(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    node = origin(by_name, tensor, _PASS)
    return node is not None and node.op in VARIABLES
