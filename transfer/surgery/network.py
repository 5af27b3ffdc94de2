"""GraphDef to GraphDef: what a tap needs, as a pure function of an input and of weights.

Pure functions throughout: nothing is imported, run or changed in place. A tensor's name is
``operation:index`` everywhere; a bare operation's name means its output 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer import policy
from transfer.surgery.graphs import (
    ancestors,
    canonical,
    dtype_of,
    is_branch_pivot,
    placeholders,
    split_tensor_name,
)

REFERENCE_VARIABLES = frozenset({"Variable", "VariableV2", "AutoReloadVariable"})
VARIABLES = REFERENCE_VARIABLES | {"VarHandleOp"}
_READS = frozenset({"Identity", "ReadVariableOp"})
# What refers to nodes, shapes or gradient functions that a pruned graph does not have.
_STALE_ATTRIBUTES = ("_class", "_output_shapes", "_gradient_op_type")
_BATCH_NORMS = frozenset({"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"})
_STATISTICS = re.compile(r"(moving|running)_(mean|variance|var)\b")


@dataclass(frozen=True)
class Variable:
    """A variable that a network reads.

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
    them but are not in it: who imports the graph supplies them.

    Raises:
        ForbiddenOpError: if there is anything but arithmetic in it.
    """

    graph_def: GraphDef
    input: str
    input_dtype: tf.DType | None
    output: str
    variables: tuple[Variable, ...]

    def __post_init__(self) -> None:
        policy.check_ops(self.graph_def)


def extract(
    graph_def: GraphDef,
    output: str,
    input: str,
    input_dtype: tf.DType | None = None,
    feeds: Mapping[str, float | bool] | None = None,
) -> Network:
    """The part of a graph between two tensors, with its variables as inputs.

    Args:
        graph_def: any TF1 graph; it is not changed.
        output: tensor to compute.
        input: tensor that is fed; what lies before it is left out.
        input_dtype: of that tensor; inputs of other types are cast to it.
        feeds: values of other placeholders.

    Raises:
        ValueError: if a placeholder has no value, or the output does not depend on the input.
        ForbiddenOpError: if there is anything but arithmetic in between.
    """
    fed = _with_constants(graph_def, feeds or {})
    nodes = ancestors(fed, output, stop_at=[input])
    _check_depends(nodes, output, input)
    variables = tuple(_variable(node) for node in nodes if node.op in VARIABLES)
    names = {variable.name for variable in variables}
    nodes = [node for node in nodes if node.name not in names]
    aliases = _reads_of(nodes, names)
    nodes = [node for node in nodes if f"{node.name}:0" not in aliases]
    _check_placeholders(nodes)
    pivots = {node.name for node in nodes if is_branch_pivot(node)}
    nodes = [_clean(node, aliases, pivots) for node in nodes]
    statistics = _statistics(nodes)
    variables = tuple(
        replace(v, trainable=v.trainable and v.name not in statistics) for v in variables
    )
    return Network(
        graph_def=GraphDef(node=nodes, versions=fed.versions),
        input=canonical(input),
        input_dtype=input_dtype,
        output=aliases.get(canonical(output), canonical(output)),
        variables=variables,
    )


def cut(network: Network, at: str) -> tuple[Network, Network]:
    """Cut a network in two at a tensor: the second part applied to the first is the whole.

    Raises:
        ValueError: if the tensor is not in the network, or a branch goes round it.
    """
    at = canonical(at)
    if at != network.input and split_tensor_name(at)[0] not in {
        node.name for node in network.graph_def.node
    }:
        raise ValueError(f"cannot cut at {at!r}: it is not between the input and the tap")
    variables = {variable.name: variable for variable in network.variables}

    def part(output: str, input: str, input_dtype: tf.DType | None) -> Network:
        leaves = [network.input, input, *variables]
        nodes = ancestors(network.graph_def, output, stop_at=leaves)
        read = {split_tensor_name(edge)[0] for node in nodes for edge in node.input}
        return Network(
            graph_def=GraphDef(node=nodes, versions=network.graph_def.versions),
            input=input,
            input_dtype=input_dtype,
            output=output,
            variables=tuple(v for name, v in variables.items() if name in read),
        )

    suffix = part(network.output, at, None)
    if at != network.input:
        bypass = [node.name for node in suffix.graph_def.node if _reads(node, network.input)]
        if bypass:
            raise ValueError(
                f"cannot cut at {at!r}: it does not separate the input from the tap; a branch goes "
                f"round it, from {network.input!r} through {bypass[0]!r}"
            )
    return part(at, network.input, network.input_dtype), suffix


def _variable(node: NodeDef) -> Variable:
    shape = node.attr["shape"].shape
    known = not shape.unknown_rank and all(dim.size >= 0 for dim in shape.dim)
    dtype = tf.as_dtype(node.attr["dtype"].type)
    sizes = tuple(dim.size for dim in shape.dim) if known else None
    return Variable(node.name, dtype, sizes, trainable=dtype.is_floating)


def _statistics(nodes: Sequence[NodeDef]) -> set[str]:
    """Variables that are a batch norm's mean or variance, by their role or by their usual names."""
    roles = {
        split_tensor_name(edge)[0]
        for node in nodes
        if node.op in _BATCH_NORMS
        for edge in node.input[3:5]
    }
    names = {split_tensor_name(edge)[0] for node in nodes for edge in node.input}
    return roles | {name for name in names if _STATISTICS.search(name)}


def _with_constants(graph_def: GraphDef, feeds: Mapping[str, float | bool]) -> GraphDef:
    """The graph with constants in the place of the placeholders that are fed."""
    values = {split_tensor_name(name)[0]: value for name, value in feeds.items()}
    unknown = values.keys() - {node.name for node in graph_def.node}
    if unknown:
        raise ValueError(f"cannot feed {sorted(unknown)}: the graph has no such tensor")
    fed = GraphDef(versions=graph_def.versions)
    for node in graph_def.node:
        if node.name in values:
            fed.node.append(_constant(node, values[node.name]))
        else:
            fed.node.append(node)
    return fed


def _constant(node: NodeDef, value: float | bool) -> NodeDef:
    if not node.op.startswith("Placeholder"):
        raise ValueError(f"cannot feed {node.name!r}: it is a {node.op}, not a placeholder")
    constant = NodeDef(name=node.name, op="Const")
    constant.attr["dtype"].CopyFrom(node.attr["dtype"])
    constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype_of(node)))
    return constant


def _reads_of(nodes: Sequence[NodeDef], variables: set[str]) -> dict[str, str]:
    """Tensors that are a variable's value as it is, and ``<variable>:0`` for each.

    Two kinds of variables, one form: after the reads are gone every user names the variable itself.
    """
    aliases: dict[str, str] = {}
    for _ in range(2):  # nodes need not be sorted; a handle may pass through an Identity first
        for node in nodes:
            if node.op in _READS and node.input:
                source = canonical(node.input[0])
                source = aliases.get(source, source)
                if split_tensor_name(source)[0] in variables:
                    aliases[f"{node.name}:0"] = source
    return aliases


def _clean(node: NodeDef, aliases: Mapping[str, str], pivots: set[str]) -> NodeDef:
    """A copy without devices, stale attributes, and control dependencies but on branch pivots."""
    copy = NodeDef()
    copy.CopyFrom(node)
    copy.device = ""
    for attribute in _STALE_ATTRIBUTES:
        copy.attr.pop(attribute, None)
    del copy.input[:]
    for edge in node.input:
        if not edge.startswith("^"):
            copy.input.append(aliases.get(canonical(edge), edge))
        elif edge[1:] in pivots:
            copy.input.append(edge)
    return copy


def _reads(node: NodeDef, tensor: str) -> bool:
    return any(canonical(edge) == tensor for edge in node.input if not edge.startswith("^"))


def _check_depends(nodes: Sequence[NodeDef], output: str, input: str) -> None:
    if canonical(output) != canonical(input) and not any(
        _reads(n, canonical(input)) for n in nodes
    ):
        raise ValueError(f"{output!r} does not depend on the input {input!r}")


def _check_placeholders(nodes: Iterable[NodeDef]) -> None:
    unfed = [f"{node.name}:0" for node in placeholders(nodes)]
    if unfed:
        example = f"{unfed[0]}=1.0"
        raise ValueError(
            f"the tap also depends on {', '.join(unfed)}; give each a value, e.g. --feed {example} "
            "(1.0 for a keep_prob, False for an is_training)"
        )
