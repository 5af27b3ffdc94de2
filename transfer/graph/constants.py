"""Find weights that are stored as constants in a graph, so that they can be trained.

Frozen graphs have them, and programs that build a pretrained network from ``tf.constant``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph.graph_def import data_inputs, dtype_of, num_elements, operation_of

_CONVOLUTIONS = frozenset({"Conv2D", "Conv2DBackpropInput", "Conv3D", "DepthwiseConv2dNative"})
_PRODUCTS = frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "MatMul"})
_SELECTIONS = frozenset({"Select", "SelectV2"})
_KERNELS = _CONVOLUTIONS | _PRODUCTS


def find_weights(nodes: Sequence[NodeDef], live: Collection[str], input: str) -> list[NodeDef]:
    """The constants that are weights: operands of convolutions and matrix products on the data, and
    of all later layers.

    Constants before the first of these are preprocessing (means, scales) and are not weights.
    Neither are scalars.

    Args:
        nodes: nodes in topological order.
        live: the operations that depend on the input.
        input: the network's input.
    """
    by_name = {node.name: node for node in nodes}
    deep: set[str] = set()
    weights: list[NodeDef] = []
    seen: set[str] = set()
    alive = {operation_of(input), *live}
    for node in nodes:
        edges = [operation_of(edge) for edge in data_inputs(node)]
        is_kernel = node.op in _KERNELS and any(edge in alive for edge in edges)
        if not is_kernel and not any(edge in deep for edge in edges):
            continue
        deep.add(node.name)
        if node.op in _SELECTIONS:  # zeros of dropout, constants of step functions
            continue
        pending = [edge for edge in edges if edge not in alive]
        while pending:
            name = pending.pop()
            source = by_name.get(name)
            if source is None or name in seen:
                continue
            seen.add(name)
            if _is_weight(source):
                weights.append(source)
            pending += [operation_of(edge) for edge in data_inputs(source)]
    return weights


def _is_weight(node: NodeDef) -> bool:
    if node.op != "Const":
        return False
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating and num_elements(node) > 1
