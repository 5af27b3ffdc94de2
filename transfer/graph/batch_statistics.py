"""Operations by which the features of an image depend on the other images of its batch."""

from __future__ import annotations

from transfer.graph.conditionals import NORMS
from transfer.graph.graph_def import averages_examples, downstream, uses_batch_statistics
from transfer.graph.network import Network


def batch_statistics(network: Network) -> list[str]:
    """The operations of a network that mix the images of a batch at inference: batch norm that was
    exported in training mode, fused or by hand, as averages over the first axis.

    Example:
        >>> from transfer import load_meta_graph
        >>> from transfer.graph.batch_statistics import batch_statistics
        >>> batch_statistics(load_meta_graph("embedded").network("fc7"))
        []
    """
    nodes = {node.name: node for node in network.graph_def.node}
    live = downstream(list(nodes.values()), [network.input])
    return sorted(
        name
        for name in live
        if (nodes[name].op in NORMS and uses_batch_statistics(nodes[name]))
        or averages_examples(nodes, nodes[name])
    )
