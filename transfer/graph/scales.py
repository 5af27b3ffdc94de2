"""Find variables that are multiplicative factors and must be reinitialized to 1 instead of 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.conditionals import NORMS
from transfer.graph.graph_def import data_inputs, operation_of

_ROOTS = frozenset({"Rsqrt", "Sqrt"})
_PRODUCTS = frozenset({"Mul", "RealDiv", "Div"})
_SUMS = frozenset({"Add", "AddV2", "Maximum"})
_FORM = frozenset({"Cast", "ExpandDims", "Identity", "Reshape", "Squeeze"})
# Operations of the negative part of a PReLU, whose slope is a factor but starts at 0.
_RECTIFIERS = frozenset({"Abs", "Minimum", "Neg", "Relu", "Sub"})


def find_scales(nodes: Iterable[NodeDef], variables: Iterable[str]) -> set[str]:
    """The variables that activations are multiplied or divided by elementwise: scales and variances
    of normalization layers, detected by their use or by their usual names.

    Args:
        nodes: the nodes of a network.
        variables: names of its variables.
    """
    nodes = list(nodes)
    operations = {node.name: node for node in nodes}
    variables = set(variables)

    def source(edge: str) -> str:
        name = operation_of(edge)
        while name in operations and operations[name].op in _FORM:
            name = operation_of(operations[name].input[0])
        return name

    def is_rectified(edges: Sequence[str]) -> bool:
        others = [operations.get(source(edge)) for edge in edges]
        return any(node is not None and node.op in _RECTIFIERS for node in others)

    # The mean of tf.nn.batch_normalization: offset - mean * (scale / deviation).
    subtracted = {
        operation_of(data_inputs(node)[-1]) for node in nodes if node.op in ("Sub", "Neg")
    }
    factors = {name for name in variables if name.endswith(("gamma", "variance"))}
    for node in nodes:
        edges = data_inputs(node)
        if node.op in NORMS:
            factors |= {source(edges[1]), source(edges[4])}
        elif node.op in _ROOTS:
            inner = operations.get(source(edges[0]))
            factors |= (
                {source(e) for e in data_inputs(inner)} if inner and inner.op in _SUMS else set()
            )
            factors.add(source(edges[0]))
        elif node.op in _PRODUCTS and not is_rectified(edges) and node.name not in subtracted:
            factors |= {source(edge) for edge in edges}
    return factors & variables
