"""Extract a network: the subgraph that computes one output from one input and from weights.

Pure functions: nothing is run, and nothing is changed in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
# Attributes that refer to nodes, shapes or gradient functions that a pruned graph does not have.
_STALE_ATTRIBUTES = ("_class", "_output_shapes", "_gradient_op_type")
_STATISTICS = re.compile(r"(moving|running)_(mean|variance|var)(_\d+)?\b")

Feeds = Mapping[str, float | bool]


@dataclass(frozen=True)
class Variable:
    """A variable that a network reads, or a weight that is a constant of its graph.

    ``shape`` is ``None`` if the graph does not state it. Non-float variables and the moving
    statistics of batch norm are not trainable. The graph's own collection of trainable variables is
    ignored: transfer-learning programs exclude their pretrained network from it.
    """

    name: str
    dtype: tf.DType
    shape: tuple[int, ...] | None
    trainable: bool = True


@dataclass(frozen=True)
class Network:
    """A subgraph that computes one output, or several, from one input and from variables.

    ``graph_def`` contains only operations. They refer to the tensors ``input`` and
    ``<variable>:0``, and to ``randomness.SEED`` if they need random numbers; these must be supplied
    with ``input_map`` when the graph is imported. ``training`` is the graph for training, with
    active dropout; ``None`` if it does not differ. If ``batch_size`` is set, the network accepts
    only batches of this size. ``input_shape`` is the static shape of the input, if known; ``modes``
    are the detected switches between training and inference, which are set in both graphs.

    ``taps`` maps names to tensors if the network has several outputs; ``output`` is then the last
    of these tensors in the order of the graph. Nothing is cut at a tap: it may be inside a branch.

    Raises:
        ForbiddenOpError: if it contains operations that are not pure computation.
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
    taps: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for graph_def in self.graphs:
            policy.check(graph_def)

    @property
    def graphs(self) -> list[GraphDef]:
        """The graph for inference, and that for training if it differs."""
        return [self.graph_def] if self.training is None else [self.graph_def, self.training]

    @property
    def outputs(self) -> tuple[str, ...]:
        """All output tensors: those of the taps in their order, else ``output``."""
        return tuple(self.taps.values()) or (self.output,)


def extract(
    graph_def: GraphDef,
    output: str | Mapping[str, str],
    input: str,
    input_dtype: tf.DType | None = None,
    feeds: Feeds | None = None,
    keep_dropout: bool = False,
    input_shape: tuple[int | None, ...] | None = None,
) -> Network:
    """Extract the subgraph between an input and an output, with its variables as inputs.

    Args:
        graph_def: any TF1 graph; it is not changed.
        output: tensor to compute; or several, names to tensors, see ``Network.taps``.
        input: tensor to feed; nodes before it are removed.
        input_dtype: dtype of the input; inputs of other dtypes are cast to it.
        feeds: values of other placeholders, at inference and in training. Switches between training
            and inference (see ``modes``) are set automatically.
        keep_dropout: keep dropout active in the graph for inference.
        input_shape: shape of the input, if known.

    Raises:
        ValueError: if a placeholder has no value, or an output does not depend on the input.
        ForbiddenOpError: if it contains operations that are not pure computation.
    """
    feeds = _check_feeds(graph_def, feeds or {})
    taps = {} if isinstance(output, str) else output
    requested = [output] if isinstance(output, str) else output.values()
    outputs = [canonical(name) for name in requested]
    for name in requested:
        nodes = ancestors(graph_def.node, name, stop_at=[input])
        _check_depends(nodes, name, input)
    if len(outputs) > 1:
        nodes = ancestors(graph_def.node, outputs, stop_at=[input])
    switches = modes.find(nodes, canonical(input))
    inference = {mode.tensor: mode.inference for mode in switches} | feeds
    training = {mode.tensor: mode.training for mode in switches} | feeds

    in_use = _with_constants(nodes, inference)
    parts = [_arithmetic(in_use, outputs, input, drop=keep_dropout)]
    switched = {operation_of(name) for name in inference}
    constant = {node.name: node for node in in_use if node.name in switched}
    with_training = _with_constants(nodes, training)
    parts.append(_arithmetic(with_training, outputs, input, drop=True, inference=constant))

    variables: dict[str, Variable] = {}
    lifted = []
    fixed = conditionals.stored(in_use)
    for part, names in parts:
        _check_placeholders(part)
        mine, rest, alias = _lift_variables(part, input)
        mine = [replace(v, trainable=v.trainable and v.name not in fixed) for v in mine]
        variables = {v.name: v for v in mine} | variables
        results = [alias.get(name, canonical(name)) for name in names]
        lifted.append((with_nodes(graph_def, rest), results))
    (with_dropout_off, results), (with_dropout_on, training_results) = lifted
    in_order = [variables[n.name] for n in graph_def.node if n.name in variables]
    same = with_dropout_off == with_dropout_on or training_results != results
    position = {node.name: number for number, node in enumerate(with_dropout_off.node)}
    return Network(
        graph_def=with_dropout_off,
        input=canonical(input),
        input_dtype=input_dtype,
        output=max(results, key=lambda name: position.get(operation_of(name), -1)),
        variables=tuple(in_order),
        training=None if same else with_dropout_on,
        input_shape=input_shape,
        modes=tuple(m for m in switches if m.tensor not in feeds),
        taps=dict(zip(taps, results, strict=True)) if taps else {},
    )


def _arithmetic(
    nodes: Sequence[NodeDef],
    outputs: Sequence[str],
    input: str,
    *,
    drop: bool,
    inference: Mapping[str, NodeDef] | None = None,
) -> tuple[list[NodeDef], list[str]]:
    """The nodes without conditionals, and without dropout unless ``drop``; and the output names."""
    resolved, outputs = conditionals.resolve(nodes, outputs, inference)
    resolved = ancestors(resolved, outputs, stop_at=[input])
    if not drop:
        live = {operation_of(input), *downstream(resolved, [input])}
        resolved = dropout.bypass(resolved, live)
        resolved = ancestors(resolved, outputs, stop_at=[input])
    return seeded(resolved), outputs


def _lift_variables(
    nodes: Sequence[NodeDef], input: str
) -> tuple[list[Variable], list[NodeDef], dict[str, str]]:
    """Separate variables from nodes: the variables, the other nodes, which read them by name, and
    aliases of the variables."""
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
    """Cut a network in two at a tensor, such that their composition is the network.

    A network with several outputs is cut before all of them, and the second part has them.

    Raises:
        ValueError: if the tensor is not in the network, a branch bypasses it, or an output is
            before it.
    """
    at = canonical(at)
    variables = {variable.name: variable for variable in network.variables}

    def part(
        output: str, input: str, input_dtype: tf.DType | None, taps: Mapping[str, str]
    ) -> Network:
        graphs = [
            _between(
                graph_def,
                [*taps.values()] or [output],
                [network.input, input, SEED, *variables],
            )
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
            taps=taps,
        )

    for graph_def in network.graphs:
        if at != network.input and operation_of(at) not in {node.name for node in graph_def.node}:
            raise ValueError(
                f"cannot cut at {at!r}: it is not between the input and the tap "
                "(vgg-transfer inspect lists the cuts)"
            )
    suffix = part(network.output, at, None, network.taps)
    if at != network.input:
        _check_after(network, at)
        bypass = [n.name for g in suffix.graphs for n in g.node if _reads(n, network.input)]
        if bypass:
            raise ValueError(
                f"cannot cut at {at!r}: it does not separate the input from the tap; a branch "
                f"bypasses it, from {network.input!r} through {bypass[0]!r}"
            )
    return part(at, network.input, network.input_dtype, {}), suffix


def _between(graph_def: GraphDef, outputs: Sequence[str], leaves: Iterable[str]) -> GraphDef:
    return with_nodes(graph_def, ancestors(graph_def.node, outputs, stop_at=leaves))


def _check_after(network: Network, at: str) -> None:
    """Check that all taps depend on a tensor."""
    after = downstream(network.graph_def.node, [at])
    before = [n for n, t in network.taps.items() if t != at and operation_of(t) not in after]
    if before:
        raise ValueError(
            f"cannot cut at {at!r}: tap {before[0]!r} does not depend on it; cut before the "
            "earliest tap"
        )


def variable(node: NodeDef) -> Variable:
    """The ``Variable`` of a node that is a variable or a constant weight."""
    dtype = dtype_of(node) or tf.float32
    if node.op == "Const":
        dims = node.attr["value"].tensor.tensor_shape.dim
        return Variable(node.name, dtype, tuple(dim.size for dim in dims))
    shape = node.attr["shape"].shape
    known = not shape.unknown_rank and all(dim.size >= 0 for dim in shape.dim)
    sizes = tuple(dim.size for dim in shape.dim) if known else None
    return Variable(node.name, dtype, sizes, trainable=dtype.is_floating)


def _statistics(nodes: Sequence[NodeDef]) -> set[str]:
    """Moving means and variances of batch norm, detected by their use or by their usual names."""
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
    """Replace fed nodes by constants."""
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
    """Replace the read of a variable that is now a constant by an identity."""
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
    """Tensors that are reads of a variable, to ``<variable>:0``.

    This gives reference and resource variables the same form: users refer to the variable itself.
    """
    aliases: dict[str, str] = {}
    for node in nodes:  # in topological order
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
