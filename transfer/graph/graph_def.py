"""Utilities to read a GraphDef: tensor names, dependencies, shapes and dtypes.

Tensor names are ``operation:index``; an operation name alone means its output 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_INVALID, DT_RESOURCE, DT_VARIANT

from transfer.core.private_api import find_op_def

REFERENCE_VARIABLES = frozenset({"Variable", "VariableV2", "AutoReloadVariable"})
VARIABLES = REFERENCE_VARIABLES | {"VarHandleOp"}
SWITCHES = frozenset({"Switch", "RefSwitch"})
_LOOPS = frozenset({"Enter", "Exit", "LoopCond", "NextIteration", "RefEnter", "RefExit"})
MAX_CONSTANT_ELEMENTS = 2**20
MAX_OUTPUTS = 10_000
MAX_NODES = 500_000
"""Maximum number of nodes of a graph; programs that train on eight GPUs have 200,000."""
MAX_TRACE = 100
_LOOP_CALLS = frozenset({"StatelessWhile", "While"})


def split_tensor_name(name: str) -> tuple[str, int]:
    """``"a/b:1"`` to ``("a/b", 1)``; ``"a/b"`` to ``("a/b", 0)``."""
    operation, colon, index = name.rpartition(":")
    return (operation, int(index)) if colon and index.isdecimal() else (name, 0)


def canonical(name: str) -> str:
    """``"a"`` and ``"a:0"`` to ``"a:0"``; a control dependency ``"^a"`` is unchanged."""
    if name.startswith("^"):
        return name
    return "{}:{}".format(*split_tensor_name(name))


def operation_of(tensor: str) -> str:
    """The operation name of a tensor or control dependency."""
    return split_tensor_name(tensor.removeprefix("^"))[0]


def data_inputs(node: NodeDef) -> list[str]:
    """The inputs of a node without its control dependencies."""
    return [edge for edge in node.input if not edge.startswith("^")]


def check(nodes: Iterable[NodeDef]) -> None:
    """Reject a graph with empty or duplicate names, missing inputs, or too many nodes or outputs.

    Raises:
        ValueError: with the first such node.
    """
    seen: set[str] = set()
    for node in nodes:
        if not node.name or node.name in seen:
            raise ValueError(f"the graph is damaged: two nodes are named {node.name!r}")
        seen.add(node.name)
        if len(seen) > MAX_NODES:
            raise ValueError(f"the graph has over {MAX_NODES:,} nodes; it is damaged")
        op_def = find_op_def(node.op)
        for argument in () if op_def is None else op_def.output_arg:
            if argument.number_attr and node.attr[argument.number_attr].i > MAX_OUTPUTS:
                raise ValueError(
                    f"the graph is damaged: {node.name!r} has {node.attr[argument.number_attr].i} "
                    f"outputs; at most {MAX_OUTPUTS:,} are taken"
                )
        beyond = [e for e in data_inputs(node) if split_tensor_name(e)[1] > MAX_OUTPUTS]
        if beyond:
            raise ValueError(f"the graph is damaged: {node.name!r} reads {beyond[0][:80]!r}")
        needed = 0 if op_def is None else len(op_def.input_arg)
        if needed and any(arg.number_attr or arg.type_list_attr for arg in op_def.input_arg):
            needed = 1
        if len(data_inputs(node)) < needed:
            raise ValueError(
                f"the graph is damaged: {node.name!r} is a {node.op}, which takes {needed} inputs, "
                f"and has {len(data_inputs(node))}"
            )


def ancestors(
    nodes: Iterable[NodeDef], output: str | Sequence[str], stop_at: Iterable[str] = ()
) -> list[NodeDef]:
    """The nodes that a tensor, or any of several, depends on, up to ``stop_at``, in topological
    order.

    Control dependencies are ignored, since there are no side effects to order, except those that
    tell which branch of a conditional a node belongs to.

    Raises:
        ValueError: if a node refers to one that does not exist, the graph has a cycle, or the
            tensor depends on a while loop.
    """
    by_name = {node.name: node for node in nodes}
    stops = {canonical(name) for name in stop_at}
    edges: dict[str, list[str]] = {}
    outputs = [output] if isinstance(output, str) else output
    pending = [canonical(name) for name in outputs if canonical(name) not in stops]
    while pending:
        name = operation_of(pending.pop())
        if name in edges:
            continue
        if name not in by_name:
            raise ValueError(f"the graph is damaged: it refers to {name!r}, which does not exist")
        _check_no_loop(by_name[name], outputs)
        followed = [
            edge
            for edge in by_name[name].input
            if (
                _is_branch_pivot(by_name.get(edge[1:]))
                if edge.startswith("^")
                else canonical(edge) not in stops
            )
        ]
        edges[name] = [operation_of(edge) for edge in followed]
        pending += followed
    try:
        return [by_name[name] for name in TopologicalSorter(edges).static_order()]
    except CycleError as error:
        raise ValueError(
            f"the graph is damaged: {', '.join(error.args[1][:4])} depend on each other in a cycle"
        ) from None


def consumers(nodes: Iterable[NodeDef]) -> dict[str, list[NodeDef]]:
    """Operation name to the nodes that use one of its outputs."""
    users: dict[str, list[NodeDef]] = {}
    for node in nodes:
        for edge in data_inputs(node):
            users.setdefault(operation_of(edge), []).append(node)
    return users


def outputs(nodes: Iterable[NodeDef]) -> dict[str, list[str]]:
    """Operation name to those of its outputs that are used, sorted by index."""
    read: dict[str, set[int]] = {}
    for node in nodes:
        for edge in data_inputs(node):
            operation, index = split_tensor_name(edge)
            read.setdefault(operation, set()).add(index)
    return {name: [f"{name}:{i}" for i in sorted(indices)] for name, indices in read.items()}


def downstream(nodes: Sequence[NodeDef], tensors: Iterable[str]) -> set[str]:
    """The operations among ``nodes`` (in topological order) that depend on one of ``tensors``."""
    sources = {canonical(tensor) for tensor in tensors}
    dependent: set[str] = set()
    for node in nodes:
        if any(canonical(e) in sources or operation_of(e) in dependent for e in data_inputs(node)):
            dependent.add(node.name)
    return dependent


def placeholders(nodes: Iterable[NodeDef]) -> list[NodeDef]:
    """The placeholders that must be fed."""
    return [node for node in nodes if node.op in ("Placeholder", "PlaceholderV2")]


def uses_batch_statistics(norm: NodeDef) -> bool:
    """Whether a fused batch norm normalizes with the statistics of the batch. TensorFlow leaves
    attributes with their default out of SavedModels, and the default of ``is_training`` is true."""
    attr = norm.attr.get("is_training")  # [] would add it
    return attr is None or attr.WhichOneof("value") is None or bool(attr.b)


def averages_examples(by_name: Mapping[str, NodeDef], node: NodeDef) -> bool:
    """Whether a node averages over the first axis, the images of a batch."""
    if node.op != "Mean":
        return False
    axes = constant(by_name.get(operation_of(data_inputs(node)[1])))
    return axes is not None and 0 in np.ravel(axes)


def static_shape(node: NodeDef, index: int = 0) -> tuple[int | None, ...] | None:
    """The shape in the attributes of a node for one of its outputs; ``None`` if not given.

    TensorFlow 1.1 and older leave ``shape`` empty and write it to ``_output_shapes``.
    """
    shapes = node.attr["_output_shapes"].list.shape if "_output_shapes" in node.attr else []
    if index < len(shapes):
        shape = shapes[index]
    elif "output_shapes" in node.attr and index < len(node.attr["output_shapes"].list.shape):
        shape = node.attr["output_shapes"].list.shape[index]
    elif "shape" in node.attr and node.attr["shape"].shape.dim:
        shape = node.attr["shape"].shape
    else:
        return None
    if shape.unknown_rank:
        return None
    return tuple(dim.size if dim.size >= 0 else None for dim in shape.dim)


def dtype_of(node: NodeDef, index: int = 0) -> tf.DType | None:
    """The dtype in the attributes of a node for one of its outputs; ``None`` if not given.

    Raises:
        ValueError: if the dtype is unknown.
    """
    kind = _fixed_type(node, index)
    for name in ("dtype", "DstT", "element_dtype", "T"):
        if kind is None and name in node.attr:
            listed = node.attr[name].list.type
            kind = listed[index] if index < len(listed) else node.attr[name].type
    for name in ("component_types", "output_types"):
        if kind is None and name in node.attr and index < len(node.attr[name].list.type):
            kind = node.attr[name].list.type[index]
    try:
        return None if kind is None else tf.as_dtype(kind)
    except TypeError:
        raise ValueError(
            f"the graph is damaged: {node.name!r} has the unknown dtype enum {kind}"
        ) from None


def _fixed_type(node: NodeDef, index: int) -> int | None:
    """The dtype of an output that does not depend on the operands, such as that of a resized
    image."""
    op_def = find_op_def(node.op)
    arguments = [] if op_def is None else op_def.output_arg[: index + 1]
    if len(arguments) <= index or any(a.number_attr or a.type_list_attr for a in arguments):
        return None
    if (name := arguments[index].type_attr) and op_def is not None:
        default = next((a.default_value for a in op_def.attr if a.name == name), None)
        value = node.attr.get(name, default)
        return value.type if value is not None and value.WhichOneof("value") == "type" else None
    kind = arguments[index].type
    return None if kind in (DT_INVALID, DT_RESOURCE, DT_VARIANT) else kind


def num_elements(node: NodeDef) -> int:
    """Number of elements of a constant according to its shape."""
    return math.prod(max(dim.size, 0) for dim in node.attr["value"].tensor.tensor_shape.dim)


def constant(node: NodeDef | None) -> np.ndarray | None:
    """The value of a constant; ``None`` if the node is not a constant, too large, or invalid."""
    if node is None or node.op != "Const" or num_elements(node) > MAX_CONSTANT_ELEMENTS:
        return None
    try:
        return np.asarray(tf.make_ndarray(node.attr["value"].tensor))
    except (ValueError, TypeError, LookupError):  # raised by NumPy for inconsistent sizes and types
        return None


def trace(nodes: Mapping[str, NodeDef], tensor: str, through: Iterable[str]) -> Iterator[NodeDef]:
    """Follow first inputs backwards from a tensor while the operation is in ``through``; the last
    node is the first one that is not."""
    node = nodes.get(operation_of(tensor))
    for _ in range(MAX_TRACE):  # a damaged graph may have cycles
        if node is None:
            return
        yield node
        if node.op not in through or not data_inputs(node):
            return
        node = nodes.get(operation_of(node.input[0]))


def origin(nodes: Mapping[str, NodeDef], tensor: str, through: Iterable[str]) -> NodeDef | None:
    """The last node of ``trace``; ``None`` if it leads to a tensor outside of ``nodes``."""
    passed = list(trace(nodes, tensor, through))
    if not passed or (passed[-1].op in through and data_inputs(passed[-1])):
        return None
    return passed[-1]


def with_nodes(graph_def: GraphDef, nodes: Iterable[NodeDef]) -> GraphDef:
    """A graph of these nodes, with the same ``versions``."""
    return GraphDef(node=nodes, versions=graph_def.versions)


def _check_no_loop(node: NodeDef, outputs: Iterable[str]) -> None:
    if node.op in _LOOPS or node.op in _LOOP_CALLS:
        shown = ", ".join(map(repr, outputs))
        raise ValueError(
            f"{shown} is inside of, or depends on, a while loop (node {node.name!r}): it has a "
            "value per iteration of the loop, and a layer has one; choose a tap before the loop"
        )


def _is_branch_pivot(node: NodeDef | None) -> bool:
    """Whether a node is the pivot of a branch, an Identity of a Switch of the predicate."""
    return node is not None and (
        node.op in SWITCHES or (node.op == "Identity" and "Switch" in (node.input or [""])[0])
    )
