"""Detect dropout in a graph by its structure, as built by TensorFlow 0.5 to 2.x.

All variants multiply (or select) scaled values with a random mask of 0 and 1::

    x / keep_prob * floor(keep_prob + uniform)          before 1.13, division or inverse
    x * (1 / (1 - rate)) * (uniform >= rate)            from 1.13
    where(uniform >= rate, x * scale, 0)                from 2.12
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.graph_def import (
    SWITCHES,
    VARIABLES,
    constant,
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
_OTHER: dict[Control, Control] = {"keep_prob": "rate", "rate": "keep_prob"}
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "Sub": operator.sub,
    "Div": operator.truediv,
    "RealDiv": operator.truediv,
    "Inv": lambda a: 1 / a,
    "Reciprocal": lambda a: 1 / a,
}


@dataclass(frozen=True)
class Dropout:
    """One dropout operation.

    ``node`` is its output, ``source`` its input tensor; ``control`` tells whether the tensor
    ``amount`` is the fraction to keep or to drop; ``uniform`` generates the random numbers.
    """

    node: str
    source: str
    control: Control
    amount: str
    uniform: str


def find(nodes: Sequence[NodeDef], live: Collection[str]) -> list[Dropout]:
    """Find all dropout operations.

    Args:
        nodes: the nodes of a graph.
        live: the operations that depend on the network's input.
    """
    by_name = {node.name: node for node in nodes}
    dropouts = []
    for node in nodes:
        edges = data_inputs(node)
        if node.op == "Mul":
            pairs = [(edges[0], edges[1]), (edges[1], edges[0])] if len(edges) == 2 else []
        elif node.op in _SELECTIONS and len(edges) == 3:
            # where(mask, x, 0) or where(mask, 0, x)
            pairs = [
                (values, edges[0])
                for values, other in (edges[1:], edges[:0:-1])
                if _is_zero(by_name, other)
            ]
        else:
            pairs = []
        for values, mask in pairs:
            threshold = _threshold(by_name, mask)
            if threshold is not None:
                if node.op in _SELECTIONS and values == edges[2]:  # where the mask is false
                    threshold = _OTHER[threshold[0]], *threshold[1:]
                source = _unscaled(by_name, values, live, threshold[1])
                dropouts.append(Dropout(node.name, source, *threshold))
                break
    return dropouts


def bypass(nodes: Sequence[NodeDef], live: Collection[str]) -> list[NodeDef]:
    """Replace every dropout by an identity of the same name."""
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
    """Keep probability or rate of a mask, and its random node; ``None`` if it is not dropout."""
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
    """The operand that is not the uniform random number; its meaning depends on whether that is
    first or second."""
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
    """The node that generates a uniform random number, possibly scaled: ``random * (max - min) +
    min``."""
    for _ in range(8):
        node = origin(by_name, tensor, _PASS)
        if node is None or node.op in _UNIFORM:
            return None if node is None else node.name
        if node.op not in _ADDITIONS | {"Mul", "Sub"} or not data_inputs(node):
            return None
        tensor = node.input[0]
    return None


def _is_zero(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    """Whether a tensor is all zeros, of any shape."""
    node = origin(by_name, tensor, _PASS)
    if node is None:
        return False
    if node.op in ("Fill", "BroadcastTo"):
        return _is_zero(by_name, node.input[1 if node.op == "Fill" else 0])
    if node.op == "Const":
        value = constant(node)
        return value is not None and not value.any()
    return node.op == "ZerosLike"


def _leaves(by_name: Mapping[str, NodeDef], tensor: str) -> set[str]:
    """The placeholders, variables and constants that a number depends on."""
    pending, seen, leaves = [operation_of(tensor)], set[str](), set[str]()
    while pending and len(seen) < 50:
        name = pending.pop()
        node = by_name.get(name)
        if name in seen:
            continue
        seen.add(name)
        edges = [] if node is None else data_inputs(node)
        pending += [operation_of(edge) for edge in edges]
        leaves |= set() if edges else {name}
    return leaves


def _number(by_name: Mapping[str, NodeDef], tensor: str, depth: int = 0) -> float | None:
    """The value of a number that can be computed from constants, else ``None``."""
    node = origin(by_name, tensor, _PASS)
    if node is None or depth > 10:
        return None
    if node.op == "Const":
        value = constant(node) if num_elements(node) == 1 else None
        return float(value.item()) if value is not None and value.dtype.kind in "fV" else None
    operands = [_number(by_name, edge, depth + 1) for edge in data_inputs(node)]
    if None in operands or node.op not in _ARITHMETIC:
        return None
    try:
        return _ARITHMETIC[node.op](*operands)
    except (TypeError, ZeroDivisionError):
        return None


def _is_share(by_name: Mapping[str, NodeDef], scale: str, amount: str, inverse: bool) -> bool:
    """Whether a scale belongs to a mask: it is the reciprocal of the keep probability."""
    numbers = _number(by_name, scale), _number(by_name, amount)
    if numbers[0] is None or numbers[1] is None:
        return bool(_leaves(by_name, scale) & _leaves(by_name, amount))
    kept = 1 / (numbers[0] or 1) if inverse else numbers[0]
    return any(abs(kept - share) < 1e-3 for share in (numbers[1], 1 - numbers[1]))


def _unscaled(
    by_name: Mapping[str, NodeDef], tensor: str, live: Collection[str], amount: str
) -> str:
    """The tensor before it was divided by the keep probability."""
    node = by_name.get(operation_of(tensor))
    if node is None or split_tensor_name(tensor)[1]:
        return tensor
    edges = data_inputs(node)
    if node.op in _DIVISIONS and len(edges) == 2 and _is_number(by_name, edges[1]):
        return edges[0] if _is_share(by_name, edges[1], amount, False) else tensor
    if node.op == "Mul" and len(edges) == 2:
        for scaled, scale in (edges, edges[::-1]):
            is_number = operation_of(scaled) in live and _is_number(by_name, scale)
            if is_number and _is_share(by_name, scale, amount, True):
                return scaled
    return tensor


def _is_number(by_name: Mapping[str, NodeDef], tensor: str) -> bool:
    """Whether a tensor is a scalar that depends on no variable, unlike the scale of a norm."""
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
