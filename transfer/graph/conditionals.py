"""Replace TF1 conditionals: fold branches with a constant predicate, compute and select otherwise.

``tf.cond`` of TensorFlow 1 routes tensors through a ``Switch`` into one of two branches, and a
``Merge`` forwards the result. Their gradients cannot be computed outside the program that built
them; gradients of a ``Select`` can. The operations have no side effects, so both branches may be
computed. Two differences remain: a branch that is not taken still fails on an integer division by
zero, and branches of different shapes are broadcast to a common one.
"""

from __future__ import annotations

from collections import ChainMap, deque
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_BOOL, DT_INT32

from transfer.graph.graph_def import (
    MAX_TRACE,
    SWITCHES,
    VARIABLES,
    averages_examples,
    canonical,
    constant,
    data_inputs,
    dtype_of,
    num_elements,
    operation_of,
    origin,
    split_tensor_name,
    uses_batch_statistics,
)
from transfer.graph.policy import RANDOM_OPS

_HAVE_GRADIENTS = frozenset({tf.float16, tf.bfloat16, tf.float32, tf.float64})
MERGES = frozenset({"Merge", "RefMerge"})
_ALIASES = frozenset({"Identity", "RefIdentity"})
_PASS = _ALIASES | SWITCHES
NORMS = frozenset({"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"})
_NEAR = 200
"""Number of upstream nodes searched for batch statistics; computing batch moments takes twenty."""
_FOLDED = {
    "LogicalNot": np.logical_not,
    "LogicalAnd": np.logical_and,
    "LogicalOr": np.logical_or,
    "Equal": np.equal,
    "NotEqual": np.not_equal,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
}

Branches = Mapping[str, int]
"""Predicate to the branch (0 or 1) that a node belongs to."""
MAX_BRANCHES = 5_000_000
"""Maximum number of branches of all nodes of a graph, without those inherited from one input."""


def branches(nodes: Sequence[NodeDef]) -> dict[str, Branches]:
    """Operation name to the branches it belongs to, for nodes in topological order.

    Raises:
        ValueError: if nested conditionals lead to more than ``MAX_BRANCHES``.
    """
    by_name = {node.name: node for node in nodes}
    branches_of: dict[str, Branches] = {}
    count = 0
    for node in nodes:
        lives: Branches = {}
        for edge in node.input:
            of_input = _branches_of(edge, by_name, branches_of)
            if of_input is not lives:
                count += len(of_input)
                lives = {**lives, **of_input} if lives and of_input else lives or of_input
        predicate = predicate_of(node, by_name, branches_of) if node.op in MERGES else None
        if predicate in lives:
            lives = {p: side for p, side in lives.items() if p != predicate}
        branches_of[node.name] = lives
        if count > MAX_BRANCHES:
            raise ValueError(
                f"the graph nests conditionals too deeply: {node.name!r} is inside {len(lives):,}; "
                "it is damaged or malicious"
            )
    return branches_of


def predicate_of(
    merge: NodeDef, by_name: Mapping[str, NodeDef], branches_of: Mapping[str, Branches]
) -> str | None:
    """The predicate of a ``Merge``, whose inputs are the false and the true branch, in this order.

    ``None`` if it does not belong to a conditional.
    """
    if len(data_inputs(merge)) != 2:
        return None
    sides = [_branches_of(edge, by_name, branches_of) for edge in data_inputs(merge)]
    both = [p for p in sides[0] if sides[1].get(p, sides[0][p]) != sides[0][p]]
    # A constant may lack the control dependency on its branch; then the other input determines it.
    either = [p for s, other in (sides, sides[::-1]) for p in s if p not in other]
    return next(iter((*both, *either[::-1])), None)


def _branches_of(
    edge: str, by_name: Mapping[str, NodeDef], branches_of: Mapping[str, Branches]
) -> Branches:
    node = by_name.get(operation_of(edge))
    if node is None:
        return {}
    lives = branches_of.get(node.name, {})
    if node.op in SWITCHES and not edge.startswith("^"):
        return {**lives, root(by_name, node.input[1]): split_tensor_name(edge)[1]}
    return lives


def root(by_name: Mapping[str, NodeDef], tensor: str) -> str:
    """Follow identities back to the tensor that ``tensor`` is a copy of."""
    name = canonical(tensor)
    node = by_name.get(operation_of(name))
    for _ in range(MAX_TRACE):
        if node is None or node.op not in _ALIASES or not node.input:
            break
        name = canonical(node.input[0])
        node = by_name.get(operation_of(name))
    return name


def resolve(
    nodes: Sequence[NodeDef], outputs: Sequence[str], inference: Mapping[str, NodeDef] | None = None
) -> tuple[list[NodeDef], list[str]]:
    """Remove all ``Switch`` and ``Merge`` nodes; returns the nodes and the names of the outputs.

    Args:
        nodes: nodes in topological order.
        outputs: the tensors to compute.
        inference: constants that replace mode switches at inference, by name. They decide
            conditionals between batch statistics and moving averages: batch norm always uses the
            moving averages, which are not updated here.
    """
    by_name = {node.name: node for node in nodes}
    in_use = ChainMap(dict(inference or {}), by_name)
    lives = branches(nodes)
    renamed: dict[str, str] = {}
    resolved = []

    def new_name(edge: str) -> str:
        return renamed.get(canonical(edge), edge)

    for node in nodes:
        edges = [new_name(edge) for edge in data_inputs(node)]
        predicate = predicate_of(node, by_name, lives) if node.op in MERGES else None
        if node.op in SWITCHES:
            renamed |= {f"{node.name}:{side}": edges[0] for side in (0, 1)}
            chooser = root(by_name, node.input[1])
            if known_value(by_name, chooser) is None and dtype_of(node) in _HAVE_GRADIENTS:
                gates = _gates(node, edges[0], new_name(chooser))
                resolved += gates
                renamed |= {f"{node.name}:{side}": gates[1 + side].name for side in (0, 1)}
        elif predicate is not None:
            side = known_value(by_name, predicate)
            if side is not None and inference:
                used = known_value(in_use, predicate)
                if used not in (None, side) and (
                    _is_statistics(by_name, lives, node.input[int(used)], predicate)
                    or _is_norm(by_name, lives, node.input[int(side)], predicate)
                ):
                    side = used
            resolved += _merged(node, edges, new_name(predicate), side)
            renamed[f"{node.name}:1"] = f"{node.name}/value_index:0"
        elif edges == list(node.input):
            resolved.append(node)
        else:
            copy = NodeDef()
            copy.CopyFrom(node)
            copy.input[:] = edges
            resolved.append(copy)
    return resolved, [new_name(output) for output in outputs]


def _gates(switch: NodeDef, value: str, predicate: str) -> list[NodeDef]:
    """Replacement for a ``Switch`` with unknown predicate: its input with a stopped gradient, then
    its two outputs. Only the branch taken propagates a gradient; that of the other may be NaN."""
    stopped = NodeDef(name=f"{switch.name}/stopped", op="StopGradient", input=[value])
    gates = [stopped]
    for side, pair in enumerate(((stopped.name, value), (value, stopped.name))):
        name = f"{switch.name}/side_{side}"
        gates.append(NodeDef(name=name, op="SelectV2", input=[predicate, *pair]))
    for node in gates:
        node.attr["T"].CopyFrom(switch.attr["T"])
    return gates


def known_value(nodes: Mapping[str, NodeDef], tensor: str) -> bool | None:
    """The value of a predicate if it can be computed from constants."""
    value = _value(nodes, tensor, {})
    return None if value is None or value.size != 1 else bool(value.ravel()[0])


def _value(
    nodes: Mapping[str, NodeDef], tensor: str, known: dict[str, np.ndarray | None], depth: int = 0
) -> np.ndarray | None:
    name = operation_of(tensor)
    if name not in known:
        known[name] = None
        if name in nodes and depth <= 20:
            known[name] = _evaluated(nodes, nodes[name], known, depth)
    return known[name]


def _evaluated(
    nodes: Mapping[str, NodeDef], node: NodeDef, known: dict[str, np.ndarray | None], depth: int
) -> np.ndarray | None:
    if node.op == "Const":
        return constant(node) if num_elements(node) == 1 else None
    if node.op in _PASS | {"Cast", "ReadVariableOp", "Reshape", "Squeeze"}:
        return _value(nodes, node.input[0], known, depth + 1)
    if node.op in _FOLDED:
        operands = [_value(nodes, edge, known, depth + 1) for edge in data_inputs(node)]
        if all(operand is not None for operand in operands):
            return np.asarray(_FOLDED[node.op](*operands))
    return None


def stored(nodes: Sequence[NodeDef]) -> set[str]:
    """Variables that a switch selects instead of values computed from the batch: the moving
    averages of batch norm.

    Args:
        nodes: nodes in topological order, with constants for the switches.
    """
    by_name = {node.name: node for node in nodes}
    lives = branches(nodes)
    names = set()
    for node in nodes:
        predicate = predicate_of(node, by_name, lives) if node.op in MERGES else None
        if predicate is None or known_value(by_name, predicate) is None:
            continue
        first, second = data_inputs(node)
        for kept, computed in ((first, second), (second, first)):
            source = origin(by_name, kept, _PASS | {"ReadVariableOp"})
            if source is None or source.op not in VARIABLES:
                continue
            is_norm = _is_norm(by_name, lives, computed, None)
            if is_norm and source.name not in _upstream(by_name, computed):
                names.add(source.name)
    return names


def _upstream(by_name: Mapping[str, NodeDef], tensor: str) -> set[str]:
    pending, seen = deque([operation_of(tensor)]), set[str]()
    while pending and len(seen) < _NEAR:
        name = pending.popleft()
        if name in by_name and name not in seen:
            seen.add(name)
            pending += [operation_of(edge) for edge in data_inputs(by_name[name])]
    return seen


def _is_statistics(
    by_name: Mapping[str, NodeDef], lives: Mapping[str, Branches], tensor: str, predicate: str
) -> bool:
    """Whether a branch reads moving averages, or normalizes with them: in the branch, not before
    the conditional."""
    node = origin(by_name, tensor, _PASS | {"ReadVariableOp"})
    return node is not None and (
        node.op in VARIABLES or (node.op in NORMS and predicate in lives[node.name])
    )


def _is_norm(
    by_name: Mapping[str, NodeDef],
    lives: Mapping[str, Branches],
    tensor: str,
    predicate: str | None,
) -> bool:
    """Whether a branch computes batch statistics, and generates no random numbers."""
    pending, seen, takes_statistics = deque([operation_of(tensor)]), set[str](), False
    while pending and len(seen) < _NEAR:
        node = by_name.get(pending.popleft())
        if (
            node is None
            or node.name in seen
            or (predicate is not None and predicate not in lives[node.name])
        ):
            continue
        seen.add(node.name)
        if node.op in RANDOM_OPS:
            return False
        if node.op in NORMS:
            takes_statistics |= uses_batch_statistics(node)
        else:
            takes_statistics |= averages_examples(by_name, node)
        pending += [operation_of(edge) for edge in data_inputs(node)]
    return takes_statistics


def _merged(
    merge: NodeDef, edges: Sequence[str], predicate: str, side: bool | None
) -> list[NodeDef]:
    """Replacement for a ``Merge``: nodes for its two outputs."""
    dtype = merge.attr["T"].type
    index = NodeDef(name=f"{merge.name}/value_index")
    if side is None:
        chosen = NodeDef(name=merge.name, op="SelectV2", input=[predicate, edges[1], edges[0]])
        index.op = "Cast"
        index.input.append(predicate)
        index.attr["SrcT"].type, index.attr["DstT"].type = DT_BOOL, DT_INT32
    else:
        chosen = NodeDef(name=merge.name, op="Identity", input=[edges[int(side)]])
        index.op = "Const"
        index.attr["dtype"].type = DT_INT32
        index.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(int(side), tf.int32))
    chosen.attr["T"].type = dtype
    return [chosen, index]
