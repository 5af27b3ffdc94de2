"""What a tap needs, as arithmetic from one input, and weights, to one output.

Pure functions: nothing is run, and nothing is changed in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import conditionals, constants, dropout, modes, policy
from transfer.graph.graph_def import (
    VARIABLES,
    ancestors,
    canonical,
    data_inputs,
    downstream,
    dtype_of,
    operation_of,
    placeholders,
    with_nodes,
)
from transfer.graph.randomness import SEED, seeded

_READS = frozenset({"Identity", "ReadVariableOp", "RefIdentity"})
# What refers to nodes, shapes or gradient functions that a pruned graph does not have.
_STALE_ATTRIBUTES = ("_class", "_output_shapes", "_gradient_op_type")
_STATISTICS = re.compile(r"(moving|running)_(mean|variance|var)(_\d+)?\b")

Feeds = Mapping[str, float | bool]


@dataclass(frozen=True)
class Variable:
    """A variable that a network reads, or a weight that is a constant of its graph.

    ``shape`` is ``None`` where the graph does not say. Not trainable are what are no floats, and
    the statistics of batch norm. The graph's own collection of trainable variables is not asked:
    programs for transfer learning leave their pretrained network out of it.
    """

    name: str
    dtype: tf.DType
    shape: tuple[int, ...] | None
    trainable: bool = True


@dataclass(frozen=True)
class Network:
    """Arithmetic from one input to one output.

    ``graph_def`` holds operations only. The tensors ``input`` and ``<variable>:0`` are named by
    them but are not in it: who imports the graph supplies them, and ``randomness.SEED`` where it is
    named. ``training`` is the same with dropout on, for use while it is trained; ``None`` where
    there is no difference. Where ``batch_size`` is set, the arithmetic takes just so many examples.
    ``input_shape`` is what the graph states for its input, if it does; ``modes`` are the switches
    between training and inference that were found and set.

    Raises:
        ForbiddenOpError: if there is anything but arithmetic in it.
    """

    graph_def: GraphDef
    input: str
    input_dtype: tf.DType | None
    output: str
    variables: tuple[Variable, ...]
    training: GraphDef | None = None
    batch_size: int | None = None
    input_shape: tuple[int | None, ...] | None = None
    modes: tuple[modes.Mode, ...] = ()

    def __post_init__(self) -> None:
        for graph_def in self.graphs:
            policy.check(graph_def)

    @property
    def graphs(self) -> list[GraphDef]:
        """Of inference, and of training where that differs."""
        return [self.graph_def] if self.training is None else [self.graph_def, self.training]


def extract(
    graph_def: GraphDef,
    output: str,
    input: str,
    input_dtype: tf.DType | None = None,
    feeds: Feeds | None = None,
    keep_dropout: bool = False,
    input_shape: tuple[int | None, ...] | None = None,
) -> Network:
    """The part of a graph between two tensors, with its variables as inputs.

    Args:
        graph_def: any TF1 graph; it is not changed.
        output: tensor to compute.
        input: tensor that is fed; what lies before it is left out.
        input_dtype: of that tensor; inputs of other types are cast to it.
        feeds: values of other placeholders, in inference and in training. Those that tell training
            from inference (see ``modes``) have theirs without being fed.
        keep_dropout: leave dropout in the graph of inference, too.
        input_shape: of the input, where it is known.

    Raises:
        ValueError: if a placeholder has no value, or the output does not depend on the input.
        ForbiddenOpError: if there is anything but arithmetic in between.
    """
    feeds = _check_feeds(graph_def, feeds or {})
    nodes = ancestors(graph_def.node, output, stop_at=[input])
    _check_depends(nodes, output, input)
    found = modes.find(nodes, canonical(input))
    inference = {mode.tensor: mode.inference for mode in found} | feeds
    training = {mode.tensor: mode.training for mode in found} | feeds

    in_use = _with_constants(nodes, inference)
    parts = [_arithmetic(in_use, output, input, drop=keep_dropout)]
    switched = {operation_of(name) for name in inference}
    constant = {node.name: node for node in in_use if node.name in switched}
    with_training = _with_constants(nodes, training)
    parts.append(_arithmetic(with_training, output, input, drop=True, inference=constant))

    variables: dict[str, Variable] = {}
    lifted = []
    fixed = conditionals.stored(in_use)
    for part, name in parts:
        _check_placeholders(part)
        mine, rest, alias = _lift_variables(part, input)
        mine = [replace(v, trainable=v.trainable and v.name not in fixed) for v in mine]
        variables = {v.name: v for v in mine} | variables
        lifted.append((with_nodes(graph_def, rest), alias.get(name, name)))
    (with_dropout_off, result), (with_dropout_on, training_result) = lifted
    in_order = [variables[n.name] for n in graph_def.node if n.name in variables]
    same = with_dropout_off == with_dropout_on or training_result != result
    return Network(
        graph_def=with_dropout_off,
        input=canonical(input),
        input_dtype=input_dtype,
        output=result,
        variables=tuple(in_order),
        training=None if same else with_dropout_on,
        input_shape=input_shape,
        modes=tuple(m for m in found if m.tensor not in feeds),
    )


def _arithmetic(
    nodes: Sequence[NodeDef],
    output: str,
    input: str,
    *,
    drop: bool,
    inference: Mapping[str, NodeDef] | None = None,
) -> tuple[list[NodeDef], str]:
    """Nodes without conditionals, and without dropout or with it; the output among them."""
    resolved, output = conditionals.resolve(nodes, canonical(output), inference)
    resolved = ancestors(resolved, output, stop_at=[input])
    if not drop:
        live = {operation_of(input), *downstream(resolved, [input])}
        resolved = dropout.bypass(resolved, live)
        resolved = ancestors(resolved, output, stop_at=[input])
    return seeded(resolved), output


def _lift_variables(
    nodes: Sequence[NodeDef], input: str
) -> tuple[list[Variable], list[NodeDef], dict[str, str]]:
    """The variables among nodes, the other nodes reading them by their names, and what else is
    the name of one."""
    weights = constants.find_weights(nodes, downstream(nodes, [input]), input)
    policy.check_constants(weights)
    names = {node.name for node in nodes if node.op in VARIABLES} | {n.name for n in weights}
    aliases = _reads_of(nodes, names)
    rest = [
        _clean(node, aliases)
        for node in nodes
        if node.name not in names and f"{node.name}:0" not in aliases
    ]
    statistics = _statistics(rest)
    variables = [variable(node) for node in nodes if node.name in names]
    return (
        [replace(v, trainable=v.trainable and v.name not in statistics) for v in variables],
        rest,
        aliases,
    )


def cut(network: Network, at: str) -> tuple[Network, Network]:
    """Cut a network in two at a tensor: the second part applied to the first is the whole.

    Raises:
        ValueError: if the tensor is not in the network, or a branch goes round it.
    """
    at = canonical(at)
    variables = {variable.name: variable for variable in network.variables}

    def part(output: str, input: str, input_dtype: tf.DType | None) -> Network:
        graphs = [
            _between(graph_def, output, [network.input, input, SEED, *variables])
            for graph_def in network.graphs
        ]
        read = {operation_of(edge) for g in graphs for node in g.node for edge in node.input}
        return Network(
            graph_def=graphs[0],
            input=input,
            input_dtype=input_dtype,
            output=output,
            variables=tuple(v for name, v in variables.items() if name in read),
            training=graphs[1] if graphs[1:] not in ([], graphs[:1]) else None,
            batch_size=network.batch_size,
            input_shape=network.input_shape if input == network.input else None,
        )

    for graph_def in network.graphs:
        if at != network.input and operation_of(at) not in {node.name for node in graph_def.node}:
            raise ValueError(f"cannot cut at {at!r}: it is not between the input and the tap")
    suffix = part(network.output, at, None)
    if at != network.input:
        bypass = [n.name for g in suffix.graphs for n in g.node if _reads(n, network.input)]
        if bypass:
            raise ValueError(
                f"cannot cut at {at!r}: it does not separate the input from the tap; a branch goes "
                f"round it, from {network.input!r} through {bypass[0]!r}"
            )
    return part(at, network.input, network.input_dtype), suffix


def _between(graph_def: GraphDef, output: str, leaves: Iterable[str]) -> GraphDef:
    return with_nodes(graph_def, ancestors(graph_def.node, output, stop_at=leaves))


def variable(node: NodeDef) -> Variable:
    """A node that is a variable, or a weight, as a ``Variable``."""
    dtype = dtype_of(node) or tf.float32
    if node.op == "Const":
        dims = node.attr["value"].tensor.tensor_shape.dim
        return Variable(node.name, dtype, tuple(dim.size for dim in dims))
    shape = node.attr["shape"].shape
    known = not shape.unknown_rank and all(dim.size >= 0 for dim in shape.dim)
    sizes = tuple(dim.size for dim in shape.dim) if known else None
    return Variable(node.name, dtype, sizes, trainable=dtype.is_floating)


def _statistics(nodes: Sequence[NodeDef]) -> set[str]:
    """Variables that are a batch norm's mean or variance, by their role or by their usual names."""
    roles = {
        operation_of(edge)
        for node in nodes
        if node.op in conditionals.NORMS
        for edge in node.input[3:5]
    }
    names = {operation_of(edge) for node in nodes for edge in node.input}
    return roles | {name for name in names if _STATISTICS.search(name)}


def _check_feeds(graph_def: GraphDef, feeds: Feeds) -> dict[str, float | bool]:
    unknown = {operation_of(name) for name in feeds} - {node.name for node in graph_def.node}
    if unknown:
        raise ValueError(f"cannot feed {sorted(unknown)}: the graph has no such tensor")
    return {canonical(name): value for name, value in feeds.items()}


def _with_constants(nodes: Iterable[NodeDef], feeds: Feeds) -> list[NodeDef]:
    """The nodes with constants in the place of those that are fed."""
    values = {operation_of(name): value for name, value in feeds.items()}
    return [
        _constant(node, values[node.name])
        if node.name in values
        else _copy_of(node.input[0], node)
        if node.op == "ReadVariableOp" and operation_of(node.input[0]) in values
        else node
        for node in nodes
    ]


def _copy_of(tensor: str, read: NodeDef) -> NodeDef:
    """An identity in the place of the read of a variable that is a constant now."""
    copy = NodeDef(name=read.name, op="Identity", input=[tensor])
    copy.attr["T"].CopyFrom(read.attr["dtype"])
    return copy


def _constant(node: NodeDef, value: float | bool) -> NodeDef:
    dtype = dtype_of(node)
    is_number = node.op in VARIABLES and not node.attr["shape"].shape.dim
    if not node.op.startswith("Placeholder") and not is_number:
        raise ValueError(f"cannot feed {node.name!r}: it is a {node.op}, not a placeholder")
    if dtype is not None and dtype.is_integer and float(value).is_integer():
        value = int(value)
    try:
        tensor = tf.make_tensor_proto(value, dtype)
    except (TypeError, ValueError):
        raise ValueError(
            f"cannot feed {value!r} to {node.name!r}: it takes {dtype.name if dtype else 'nothing'}"
        ) from None
    constant = NodeDef(name=node.name, op="Const")
    constant.attr["dtype"].type = tensor.dtype
    constant.attr["value"].tensor.CopyFrom(tensor)
    return constant


def _reads_of(nodes: Iterable[NodeDef], variables: set[str]) -> dict[str, str]:
    """Tensors that are a variable's value as it is, to ``<variable>:0``.

    Two kinds of variables, one form: after the reads are gone every user names the variable itself.
    """
    aliases: dict[str, str] = {}
    for node in nodes:  # inputs come before their users
        if node.op in _READS and node.input:
            source = canonical(node.input[0])
            source = aliases.get(source, source)
            if operation_of(source) in variables:
                aliases[f"{node.name}:0"] = source
    return aliases


def _clean(node: NodeDef, aliases: Mapping[str, str]) -> NodeDef:
    """A copy without devices, stale attributes and control dependencies."""
    copy = NodeDef()
    copy.CopyFrom(node)
    copy.device = ""
    for attribute in _STALE_ATTRIBUTES:
        copy.attr.pop(attribute, None)
    copy.input[:] = [aliases.get(canonical(edge), edge) for edge in data_inputs(node)]
    return copy


def _reads(node: NodeDef, tensor: str) -> bool:
    return any(canonical(edge) == tensor for edge in data_inputs(node))


def _check_depends(nodes: Sequence[NodeDef], output: str, input: str) -> None:
    if canonical(output) != canonical(input) and not any(
        _reads(n, canonical(input)) for n in nodes
    ):
        raise ValueError(f"{output!r} does not depend on the input {input!r}")


def _check_placeholders(nodes: Iterable[NodeDef]) -> None:
    unfed = [f"{node.name}:0" for node in placeholders(nodes)]
    if unfed:
        example = {unfed[0]: 1.0}
        raise ValueError(
            f"the tap also depends on {', '.join(unfed)}; give each a value, e.g. feeds={example} "
            "(1.0 for a keep_prob, False for an is_training)"
        )
