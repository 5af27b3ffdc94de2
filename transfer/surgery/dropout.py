"""Dropout, recognised by its structure in what TensorFlow 0.5 to 2.x made of it.

All are a product (or a selection) of scaled values and a mask that is 0 or 1 at random::

    x / keep_prob * floor(keep_prob + uniform)          before 1.13, division or inverse
    x * (1 / (1 - rate)) * (uniform >= rate)            from 1.13
    where(uniform >= rate, x * scale, 0)                from 2.12
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.surgery.graphs import (
    SWITCHES,
    VARIABLES,
    data_inputs,
    num_elements,
    operation_of,
    origin,
    split_tensor_name,
)

Control = Literal["keep_prob", "rate"]

_PASS = SWITCHES | {"Cast", "Identity", "Reshape"}
_UNIFORM = frozenset({"RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2"})
_DIVISIONS = frozenset({"Div", "RealDiv"})
_ADDITIONS = frozenset({"Add", "AddV2"})
_SELECTIONS = frozenset({"Select", "SelectV2"})
_ABOVE = frozenset({"Greater", "GreaterEqual"})
_BELOW = frozenset({"Less", "LessEqual"})


@dataclass(frozen=True)
class Dropout:
    """One place where values are dropped.

    ``node`` gives what is left, ``source`` is the tensor before; ``control`` says whether the
    tensor ``amount`` is the share that is kept or that is dropped; ``uniform`` draws the numbers.
    """

    node: str
    source: str
    control: Control
    amount: str
    uniform: str


def find(nodes: Sequence[NodeDef], live: Collection[str]) -> list[Dropout]:
    """All dropout among nodes.

    Args:
        nodes: of a graph.
        live: the operations that depend on the network's input.
    """
    by_name = {node.name: node for node in nodes}
    found = []
    for node in nodes:
        edges = data_inputs(node)
        if node.op == "Mul":
            pairs = [(edges[0], edges[1]), (edges[1], edges[0])] if len(edges) == 2 else []
        elif node.op in _SELECTIONS and len(edges) == 3:
            pairs = [(edges[1], edges[0])] if operation_of(edges[2]) not in live else []
        else:
            pairs = []
        for values, mask in pairs:
            threshold = _threshold(by_name, mask)
            if threshold is not None:
                found.append(Dropout(node.name, _unscaled(by_name, values, live), *threshold))
                break
    return found


def bypass(nodes: Sequence[NodeDef], live: Collection[str]) -> list[NodeDef]:
    """The nodes with every dropout replaced by an identity of the same name."""
    sources = {dropout.node: dropout.source for dropout in find(nodes, live)}
    bypassed = []
    for node in nodes:
        if node.name in sources:
            identity = NodeDef(name=node.name, op="Identity", input=[sources[node.name]])
            identity.attr["T"].CopyFrom(node.attr["T"])
            bypassed.append(identity)
        else:
            bypassed.append(node)
    return bypassed


def _threshold(by_name: Mapping[str, NodeDef], mask: str) -> tuple[Control, str, str] | None:
    """How much a mask keeps or drops, and what draws it; ``None`` if it is no dropout's."""
    node = origin(by_name, mask, _PASS)
    if node is None:
        return None
    if node.op == "Floor":
        node = origin(by_name, node.input[0], _PASS) if node.input else None
        if node is None or node.op not in _ADDITIONS:
            return None
        return _other(by_name, node, "keep_prob", "keep_prob")
    if node.op in _ABOVE:
        return _other(by_name, node, "rate", "keep_prob")
    if node.op in _BELOW:
        return _other(by_name, node, "keep_prob", "rate")
    return None


def _other(
    by_name: Mapping[str, NodeDef], node: NodeDef, if_first: Control, if_second: Control
) -> tuple[Control, str, str] | None:
    """The operand that is not the uniform number, by whether that is the first or the second."""
    edges = data_inputs(node)
    if len(edges) != 2:
        return None
    first, second = edges
    if (drawn := _uniform(by_name, first)) is not None:
        return if_first, second, drawn
    if (drawn := _uniform(by_name, second)) is not None:
        return if_second, first, drawn
    return None


def _uniform(by_name: Mapping[str, NodeDef], tensor: str) -> str | None:
    """What draws a uniform random number, maybe scaled: ``random * (max - min) + min``."""
    for _ in range(8):
        node = origin(by_name, tensor, _PASS)
        if node is None or node.op in _UNIFORM:
            return None if node is None else node.name
        if node.op not in _ADDITIONS | {"Mul", "Sub"} or not data_inputs(node):
            return None
        tensor = node.input[0]
    return None


def _unscaled(by_name: Mapping[str, NodeDef], tensor: str, live: Collection[str]) -> str:
    """A tensor before it was divided by the share that is kept."""
    node = by_name.get(operation_of(tensor))
    if node is None or split_tensor_name(tensor)[1]:
        return tensor
    edges = data_inputs(node)
    if node.op in _DIVISIONS and len(edges) == 2 and _is_number(by_name, edges[1]):
        return edges[0]
    if node.op == "Mul" and len(edges) == 2:
        for scaled, scale in (edges, edges[::-1]):
            if operation_of(scaled) in live and _is_number(by_name, scale):
                return scaled
    return tensor


def _is_number(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    """Whether a tensor is one number that no weight has a part in, unlike the scale of a norm."""
    pending, seen = [operation_of(tensor)], set[str]()
    while pending:
        node = by_name.get(pending.pop())
        if node is None or node.op in VARIABLES or len(seen) > 20:
            return False
        if node.op == "Const" and num_elements(node) > 1:
            return False
        seen.add(node.name)
        pending += [e for e in map(operation_of, data_inputs(node)) if e not in seen]
    return True
