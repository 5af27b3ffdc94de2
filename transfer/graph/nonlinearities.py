"""Find the activations of a network: the outputs of its nonlinearities."""

from __future__ import annotations

from collections.abc import Mapping

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.graph_def import canonical, data_inputs, operation_of
from transfer.graph.network import Network
from transfer.graph.shapes import infer

_NONLINEARITIES = frozenset(
    {"Elu", "LeakyRelu", "Maximum", "Relu", "Relu6", "Selu", "Softplus", "Softsign", "Tanh"}
)
_FORM = frozenset({"Cast", "Identity", "RealDiv", "Reshape", "Squeeze", "StopGradient"})
_GATES = frozenset({"HardSigmoid", "Relu6", "Sigmoid"})
"""Nonlinearities whose product with their own input is one: swish, hard swish."""


def activations(network: Network) -> list[str]:
    """The outputs of the nonlinearities of a network, in the order of its graph.

    Those of ``[batch, width]`` and ``[batch, height, width, channels]`` with known channels; of the
    gate of a swish (``x * sigmoid(x)``), the product. Softmax is not one of them, nor is a sigmoid
    that scales channels.

    Args:
        network: the network up to its last features.

    Returns:
        Names of tensors.
    """
    nodes = {node.name: node for node in network.graph_def.node}
    shapes = infer(network)
    products: dict[str, str] = {}  # gate to the product that is the activation
    for node in nodes.values():
        if node.op == "Mul":
            products |= dict.fromkeys(_gates_of(node, nodes), node.name)
    found: dict[str, None] = {}
    for node in nodes.values():
        if node.op in _NONLINEARITIES or node.name in products:
            tensor = f"{products.get(node.name, node.name)}:0"
            shape = shapes.get(tensor)
            if (
                shape is not None
                and len(shape) in (2, 4)
                and shape[0] in (None, network.batch_size)
                and shape[-1]
            ):
                found[tensor] = None
    return list(found)


def _gates_of(product: NodeDef, nodes: Mapping[str, NodeDef]) -> list[str]:
    """The gates of a product with what they are computed from: both factors lead to one tensor."""
    first, second = (canonical(edge) for edge in data_inputs(product)[:2])
    gates = []
    for factor, other in ((first, second), (second, first)):
        name = operation_of(factor)
        for _ in range(4):  # the shift and scale of a hard sigmoid
            node = nodes.get(name)
            if node is None:
                break
            if node.op in _GATES:
                if _leads_to(node, other, nodes):
                    gates.append(node.name)
                break
            if node.op not in _FORM | {"Mul"}:
                break
            name = operation_of(data_inputs(node)[0])
    return gates


def _leads_to(gate: NodeDef, source: str, nodes: Mapping[str, NodeDef]) -> bool:
    """Whether a gate is computed from a tensor, by a shift at most."""
    edge = canonical(data_inputs(gate)[0])
    node = nodes.get(operation_of(edge))
    if edge == source:
        return True
    return (
        node is not None
        and node.op in ("Add", "AddV2", "BiasAdd")
        and any(canonical(each) == source for each in data_inputs(node))
    )
