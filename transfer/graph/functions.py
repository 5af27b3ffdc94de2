"""Inline function calls, which turns a TensorFlow 2 graph into a TensorFlow 1 graph.

Functions are looked up only in the graph's own library. TensorFlow itself would look a function up
by name among all functions of the process, so a call must never reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_BOOL

from transfer.core.private_api import find_op_def
from transfer.graph.graph_def import data_inputs, split_tensor_name

_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_IFS = frozenset({"If", "StatelessIf"})
# Limits against exponential growth: functions that each call the next one twice, nested 40 deep,
# expand to 10^12 nodes.
MAX_NODES, MAX_EDGES, MAX_BYTES = 50_000, 500_000, 2**26

Copy = tuple[NodeDef, tuple[str, ...]]
"""A node that replaces a call, and the functions it was inlined from."""


def inline(graph_def: GraphDef) -> GraphDef:
    """Replace every call of a function in the graph's library by the body of the function.

    The nodes of a body are placed in a scope named like the call; the call becomes an identity with
    the same name and outputs. ``If`` becomes ``Switch`` and ``Merge``, as in TensorFlow 1. Calls
    that cannot be resolved are unchanged (and rejected if a tap depends on them).

    Raises:
        ValueError: if a function calls itself, or the inlined bodies exceed ``MAX_NODES``,
            ``MAX_EDGES``, or ``MAX_BYTES`` plus twice the size of the graph.
    """
    library = {function.signature.name: function for function in graph_def.library.function}
    if not library:
        return graph_def
    inlined = GraphDef(versions=graph_def.versions)
    # Each node with the functions it was inlined from.
    pending: list[tuple[NodeDef, tuple[str, ...]]] = [(n, ()) for n in reversed(graph_def.node)]
    num_nodes = num_bytes = num_edges = 0
    max_bytes = MAX_BYTES + 2 * graph_def.ByteSize()
    while pending:
        node, callers = pending.pop()
        called = _called(node, library)
        if not called:
            inlined.node.append(node)
        else:
            for function in called:
                if function in callers:
                    raise ValueError(
                        f"the graph is damaged: its function {function!r} calls itself"
                    )
            bodies = [library[function] for function in called]
            expand = _inline_if if node.op in _IFS else _inline_call
            expanded = list(expand(node, bodies, library))
            pending += [(copy, (*callers, *via)) for copy, via in reversed(expanded)]
            copies = [copy for copy, _ in expanded]
            num_nodes += len(copies)
            num_bytes += sum(copy.ByteSize() for copy in copies)
            num_edges += sum(len(copy.input) for copy in copies)
            if num_nodes > MAX_NODES or num_bytes > max_bytes or num_edges > MAX_EDGES:
                raise ValueError(
                    f"the graph is too large: the bodies of its functions come to {num_nodes:,} "
                    f"nodes and {num_bytes:,} bytes or more, of which at most {MAX_NODES:,} and "
                    f"{max_bytes:,} are taken; it is damaged or malicious"
                )
    return inlined


def _called(node: NodeDef, library: dict[str, FunctionDef]) -> tuple[str, ...]:
    """The functions that a node calls, if all can be inlined."""
    if node.op in library:
        names: tuple[str, ...] = (node.op,)
    elif node.op in _CALLS:
        names = (node.attr["f"].func.name,)
    elif node.op in _IFS and node.attr["Tcond"].type == DT_BOOL:
        names = tuple(node.attr[branch].func.name for branch in ("else_branch", "then_branch"))
    else:
        return ()
    return names if all(name in library for name in names) else ()


def _inline_call(
    node: NodeDef, bodies: Sequence[FunctionDef], library: dict[str, FunctionDef]
) -> Iterator[Copy]:
    (body,) = bodies
    arguments = [edge for edge in node.input if not edge.startswith("^")]
    nodes, results = _instantiate(body, node.name, arguments, node, library)
    # Control inputs tell which branch a constant belongs to.
    controls = [edge for edge in node.input if edge.startswith("^")]
    for copy in nodes:
        if controls and not data_inputs(copy):
            copy.input.extend(controls)
        yield copy, (body.signature.name,)
    # A SavedModel restores its variables in a function, from which their checkpoint keys are read.
    effects = [f"^{n.name}" for n in nodes if n.op == "AssignVariableOp" or _called(n, library)]
    types = [argument.type for argument in body.signature.output_arg]
    yield _identity(node.name, results, types, effects), ()


def _inline_if(
    node: NodeDef, bodies: Sequence[FunctionDef], library: dict[str, FunctionDef]
) -> Iterator[Copy]:
    """Lower an ``If`` like TensorFlow does, to the form of ``tf.cond`` in TensorFlow 1."""
    predicate, *arguments = (edge for edge in node.input if not edge.startswith("^"))
    types = node.attr["Tin"].list.type
    switches = [(predicate, DT_BOOL), *zip(arguments, types, strict=False)]
    for number, (edge, dtype) in enumerate(switches):
        switch = NodeDef(name=f"{node.name}/Switch_{number}", op="Switch", input=[edge, predicate])
        switch.attr["T"].type = dtype
        yield switch, ()
    outcomes = []
    for side, (body, branch) in enumerate(zip(bodies, ("else", "then"), strict=True)):
        pivot = NodeDef(
            name=f"{node.name}/switch_{'ft'[side]}",
            op="Identity",
            input=[f"{node.name}/Switch_0:{side}"],
        )
        pivot.attr["T"].type = DT_BOOL
        yield pivot, ()
        chosen = [f"{node.name}/Switch_{i + 1}:{side}" for i in range(len(arguments))]
        copies, results = _instantiate(body, f"{node.name}/{branch}", chosen, node, library)
        for copy in copies:
            if not any(not edge.startswith("^") for edge in copy.input):
                copy.input.append(f"^{pivot.name}")  # tells which branch a constant belongs to
            yield copy, (body.signature.name,)
        outcomes.append(results)
    types = [argument.type for argument in bodies[0].signature.output_arg]
    merged = []
    for number, (edges, dtype) in enumerate(zip(zip(*outcomes, strict=True), types, strict=True)):
        merge = NodeDef(name=f"{node.name}/Merge_{number}", op="Merge", input=edges)
        merge.attr["T"].type = dtype
        merge.attr["N"].i = 2
        merged.append(merge.name)
        yield merge, ()
    yield _identity(node.name, merged, types, ()), ()


def _instantiate(
    function: FunctionDef,
    scope: str,
    arguments: Sequence[str],
    call: NodeDef,
    library: dict[str, FunctionDef],
) -> tuple[list[NodeDef], list[str]]:
    """Instantiate the body of a function: its nodes, and the tensors that it returns.

    Within a function an edge is an argument's name or ``node:output:index``; in a graph it is
    ``node:number``.
    """
    names = [argument.name for argument in function.signature.input_arg]
    if len(names) != len(arguments):
        raise ValueError(
            f"the graph is damaged: {call.name!r} calls {function.signature.name!r} with "
            f"{len(arguments)} arguments; it takes {len(names)}"
        )
    edges = dict(zip(names, arguments, strict=True))
    for node in function.node_def:
        for output, start in _output_offsets(node, library).items():
            edges[f"{node.name}:{output}"] = f"{scope}/{node.name}:{start}"

    def edge(name: str) -> str:
        if name.startswith("^"):
            return f"^{scope}/{name[1:]}"
        if name in edges:
            return edges[name]
        output, index = split_tensor_name(name)
        if output not in edges or output in names:
            raise ValueError(
                f"the graph is damaged: function {function.signature.name!r} refers to {name!r}, "
                "which it does not have"
            )
        operation, start = split_tensor_name(edges[output])
        return f"{operation}:{start + index}"

    copies = []
    for node in function.node_def:
        copy = NodeDef(name=f"{scope}/{node.name}", op=node.op)
        copy.input.extend(
            edge(name) for name in node.input if not (name[:1] == "^" and name[1:] in names)
        )
        for key, value in node.attr.items():
            copy.attr[key].CopyFrom(_attribute(value, call))
        copies.append(copy)
    outputs = [argument.name for argument in function.signature.output_arg]
    return copies, [edge(function.ret[name]) for name in outputs]


def _attribute(value: AttrValue, call: NodeDef) -> AttrValue:
    """Resolve an attribute of a node in a body; TensorFlow 1 functions may have type parameters."""
    is_parameter = value.placeholder in call.attr
    return call.attr[value.placeholder] if is_parameter else value


def _output_offsets(node: NodeDef, library: dict[str, FunctionDef]) -> dict[str, int]:
    """Name of each output of an operation to the index of its first tensor."""
    if node.op in library:
        return {arg.name: i for i, arg in enumerate(library[node.op].signature.output_arg)}
    op_def = find_op_def(node.op)
    if op_def is None:  # unknown: rejected by name if a tap depends on it
        return {}
    offsets, number = {}, 0
    for argument in op_def.output_arg:
        offsets[argument.name] = number
        if argument.number_attr:
            number += max(node.attr[argument.number_attr].i, 0)
        elif argument.type_list_attr:
            number += len(node.attr[argument.type_list_attr].list.type)
        else:
            number += 1
    return offsets


def _identity(
    name: str, edges: Sequence[str], types: Sequence[int], effects: Sequence[str]
) -> NodeDef:
    """Replacement for a call: its results under its name."""
    node = NodeDef(name=name, op="IdentityN" if edges else "NoOp", input=[*edges, *effects])
    if edges:
        node.attr["T"].list.type.extend(types)
    return node
