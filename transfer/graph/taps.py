"""Find tensors to tap by short names, and rank the tensors of a graph by their use as features."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import dropout
from transfer.graph.conditionals import NORMS, branches
from transfer.graph.graph_def import (
    VARIABLES,
    canonical,
    consumers,
    data_inputs,
    operation_of,
    split_tensor_name,
    static_shape,
    uses_batch_statistics,
)
from transfer.graph.policy import RANDOM_OPS

SOURCES = frozenset(
    """
    IteratorGetNext IteratorGetNextSync Placeholder PlaceholderV2 PlaceholderWithDefault
    QueueDequeue QueueDequeueMany QueueDequeueManyV2 QueueDequeueUpTo QueueDequeueUpToV2
    QueueDequeueV2
    """.split()  # noqa: SIM905
)
"""Operations that provide data to a graph."""
_LAYERS = frozenset(
    {"BatchMatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul"}
)
_HEADS = frozenset(
    """
    ArgMax InTopK InTopKV2 LogSoftmax Sigmoid Softmax SoftmaxCrossEntropyWithLogits
    SparseSoftmaxCrossEntropyWithLogits TopK TopKV2
    """.split()  # noqa: SIM905
)
# Scopes of nodes that do not belong to the network, from tf.gradients and tf.train.
_ASIDE = ("gradients", "save", "Initializer", "report_uninitialized_variables")


@dataclass(frozen=True)
class Tap:
    """A tensor with features.

    ``shape`` is its shape in the graph, ``None`` if not given; ``why`` explains its rank to users.
    """

    tensor: str
    shape: tuple[int | None, ...] | None
    why: str


def find(nodes: Sequence[NodeDef], name: str, inputs: Iterable[str] = ()) -> list[str]:
    """The tensors that a name may refer to; several if it is ambiguous.

    A full name refers to itself. A short one is a component of a path: ``fc7`` is the output of the
    scope ``vgg_16/fc7``, ``vgg_16/fc7/Relu:0``.

    Args:
        nodes: the nodes of a graph.
        name: name of the tensor.
        inputs: tensors that provide data, in addition to the graph's own sources.
    """
    operation, index = split_tensor_name(name)
    if any(node.name == operation and "Summary" not in node.op for node in nodes):
        return [f"{operation}:{index}"]
    forward = _forward(nodes, inputs)
    inner: list[tuple[NodeDef, str]] = []
    # TensorFlow numbers reopened scopes: fc7_1. An exact match takes precedence.
    for pattern in (re.escape(operation), re.escape(operation) + r"_\d+"):
        if not inner:
            inner = [(n, scope) for n in forward if (scope := _scope(n.name, pattern))]
    users = consumers(forward)
    scopes: dict[str, list[str]] = {}
    for node, scope in inner:
        outside = [
            user for user in users.get(node.name, []) if not f"{user.name}/".startswith(f"{scope}/")
        ]
        if outside or not users.get(node.name):
            scopes.setdefault(scope, []).append(node.name)
    matches = []
    for outputs in scopes.values():
        used = [name for name in outputs if users.get(name)]
        matches += [f"{name}:{index}" for name in used or outputs[-1:]]
    same_name = [node.name for node in nodes if node.name.rpartition("/")[2] == operation]
    return matches or [f"{name}:{index}" for name in same_name]


def _scope(name: str, pattern: str) -> str | None:
    """A node's name up to and including a path component; ``None`` if it has no such component."""
    match = re.match(rf"(.*?/)?{pattern}(?=/|$)", name)
    return match[0] if match else None


def rank(
    nodes: Sequence[NodeDef],
    is_covered: Callable[[Collection[str]], bool],
    outputs: Iterable[str] = (),
    limit: int = 8,
) -> list[Tap]:
    """Rank tensors with features, most promising first: the inputs of the last layers.

    Args:
        nodes: all nodes of a graph.
        is_covered: whether the checkpoint has all variables of the given names.
        outputs: tensors that are known to be outputs.
        limit: maximum number of taps to return.
    """
    forward = _forward(nodes)
    by_name = {node.name: node for node in nodes}
    alive = {node.name for node in forward} | {n.name for n in nodes if n.op in SOURCES}
    order = _sorted(forward)
    layers = [n for n in order if n.op in _LAYERS and _has_weights(n, by_name, alive)]
    after = _layers_after(order, {layer.name for layer in layers})
    ends = {n.name for n in order if n.op in _HEADS} | set(map(operation_of, outputs))
    heads = _leading_to(order, ends)
    before = _upstream_facts(order, by_name, {layer.name for layer in layers})
    readers: dict[str, list[NodeDef]] = {}
    for layer in layers:
        data = next(e for e in data_inputs(layer) if operation_of(e) in alive)
        readers.setdefault(canonical(data), []).append(layer)

    position = {node.name: number for number, node in enumerate(nodes)}

    @functools.cache
    def facts(tensor: str) -> tuple[Any, ...]:
        reading = readers[tensor]
        distance = min(after[layer.name] for layer in reading)
        # Features as narrow as the logits computed from them contain little more information.
        widths = [_width(by_name, name) for name in (tensor, reading[0].name)]
        is_narrow = distance == 0 and widths[0] is not None and widths[0] == widths[1]
        variables, depth, is_training = before.get(operation_of(tensor), (frozenset(), 0, False))
        mine = set().union(*(before[layer.name][0] for layer in reading)) | variables
        return (
            depth == 0,
            not is_covered(mine),
            not any(layer.name in heads for layer in reading),
            is_training,
            is_narrow,
            distance,
            -depth,
            -position[operation_of(tensor)],  # of several copies, the one built last
        )

    ranked = sorted(readers, key=facts)
    if ranked:
        # If no copy is for inference, dropout that is always applied does not distinguish them.
        best = min(facts(tensor)[:3] for tensor in readers)
        last = min(facts(tensor)[5] for tensor in readers if facts(tensor)[:3] == best)
        tips = [f for f in map(facts, readers) if (f[:3], f[5]) == (best, last)]
        if all(fact[3] for fact in tips):
            ranked.sort(key=lambda tensor: (*facts(tensor)[:3], *facts(tensor)[4:]))
    return [
        Tap(tensor, _shape(by_name, tensor), _why(readers[tensor], facts(tensor), after))
        for tensor in ranked[:limit]
    ]


def _why(reading: Sequence[NodeDef], facts: tuple[Any, ...], after: Mapping[str, int]) -> str:
    is_input, uncovered, headless, is_training, is_narrow, distance, depth, _ = facts
    position = "the last layer" if distance == 0 else f"{distance} before the last layer"
    words = [f"read by {reading[0].name!r}, {position}"]
    words.append("it is the input itself" if is_input else f"{-depth} deep")
    if headless:
        words.append("leads to no softmax, argmax or loss")
    if is_narrow:
        words.append("as narrow as the output")
    if is_training:
        words.append("of a copy for training")
    if uncovered:
        words.append("the checkpoint lacks some of its variables")
    return "; ".join(words)


def _forward(nodes: Iterable[NodeDef], inputs: Iterable[str] = ()) -> list[NodeDef]:
    """The nodes that depend on the data, without gradients, savers and summaries."""
    kept = {node.name: node for node in nodes if not _is_aside(node)}
    users = consumers(kept.values())
    reached: set[str] = set()
    pending = [node.name for node in kept.values() if node.op in SOURCES]
    pending += map(operation_of, inputs)
    while pending:
        for user in users.get(pending.pop(), []):
            if user.name not in reached:
                reached.add(user.name)
                pending.append(user.name)
    return [node for node in kept.values() if node.name in reached]


def _is_aside(node: NodeDef) -> bool:
    parts = node.name.split("/")
    return (
        any(part.endswith("_grad") or part.rstrip("_0123456789") in _ASIDE for part in parts)
        or node.op in VARIABLES
        or "Summary" in node.op
        or (
            node.op.startswith(("Assign", "Apply", "ResourceApply", "Save", "Restore", "Queue"))
            and node.op not in SOURCES
        )
    )


def _sorted(nodes: Sequence[NodeDef]) -> list[NodeDef]:
    """Sort nodes topologically; in cycles of loops, as far as possible."""
    by_name = {node.name: node for node in nodes}
    done: set[str] = set()
    order = []
    for node in nodes:
        stack = [(node, iter(data_inputs(node)))]
        if node.name in done:
            continue
        done.add(node.name)
        while stack:
            current, edges = stack[-1]
            edge = next(edges, None)
            if edge is None:
                order.append(current)
                stack.pop()
            elif (name := operation_of(edge)) in by_name and name not in done:
                done.add(name)
                stack.append((by_name[name], iter(data_inputs(by_name[name]))))
    return order


def _has_weights(node: NodeDef, by_name: Mapping[str, NodeDef], alive: Collection[str]) -> bool:
    """Whether one operand depends on the data and the other does not."""
    edges = [operation_of(edge) for edge in data_inputs(node)][:2]
    return len(edges) == 2 and sum(edge in alive for edge in edges) == 1


def _layers_after(order: Sequence[NodeDef], layers: Collection[str]) -> dict[str, int]:
    """Operation name to the maximum number of layers on a path from it to an end."""
    after: dict[str, int] = {}
    for node in reversed(order):
        below = after.setdefault(node.name, 0) + (node.name in layers)
        for edge in data_inputs(node):
            name = operation_of(edge)
            after[name] = max(after.get(name, 0), below)
    return after


def _leading_to(order: Sequence[NodeDef], ends: Collection[str]) -> set[str]:
    leading = set(ends)
    for node in reversed(order):
        if node.name in leading:
            leading |= {operation_of(edge) for edge in data_inputs(node)}
    return leading


def _upstream_facts(
    order: Sequence[NodeDef], by_name: Mapping[str, NodeDef], layers: Collection[str]
) -> dict[str, tuple[frozenset[str], int, bool]]:
    """For each operation: the variables it depends on, its depth in layers, and whether it belongs
    to a copy for training, which generates random numbers or uses batch statistics."""
    facts: dict[str, tuple[frozenset[str], int, bool]] = {}

    def of(name: str) -> tuple[frozenset[str], int, bool]:
        if name in facts:
            return facts[name]
        # Does not depend on the data: a variable or a read of it.
        pending, variables, seen = [name], set(), set[str]()
        while pending:
            node = by_name.get(pending.pop())
            if node is None or node.name in seen or node.name in facts:
                continue
            seen.add(node.name)
            if node.op in VARIABLES:
                variables.add(node.name)
            else:
                pending += [operation_of(edge) for edge in data_inputs(node)]
        facts[name] = (frozenset(variables), 0, False)
        return facts[name]

    lives = branches(order)
    masks = {d.uniform: d for d in dropout.find(list(by_name.values()), {n.name for n in order})}

    def trains(node: NodeDef) -> bool:
        if lives[node.name]:
            return False  # controlled by a switch
        if node.op in NORMS:
            return uses_batch_statistics(node)
        if node.name not in masks:
            return node.op in RANDOM_OPS
        control = by_name.get(operation_of(masks[node.name].amount))
        return control is not None and control.op == "Const"

    for node in order:
        above = [of(operation_of(edge)) for edge in data_inputs(node)]
        facts[node.name] = (
            frozenset().union(*(variables for variables, _, _ in above)),
            max((depth for _, depth, _ in above), default=0) + (node.name in layers),
            trains(node) or any(training for _, _, training in above),
        )
    return facts


def _shape(by_name: Mapping[str, NodeDef], tensor: str) -> tuple[int | None, ...] | None:
    operation, index = split_tensor_name(tensor)
    return static_shape(by_name[operation], index) if operation in by_name else None


def _width(by_name: Mapping[str, NodeDef], tensor: str) -> int | None:
    return (_shape(by_name, tensor) or (None,))[-1]
