"""Make random operations stateless, with the seed as an input, so that runs are reproducible and
can be resumed. TensorFlow 1's random operations depend on the state of the session."""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.types_pb2 import DT_INT32

SEED = "vgg_transfer_seed:0"
"""The additional input tensor of a graph with random numbers: int32 ``[2]``."""

_STATELESS = {
    "RandomUniform": "StatelessRandomUniform",
    "RandomStandardNormal": "StatelessRandomNormal",
    "TruncatedNormal": "StatelessTruncatedNormal",
    "RandomUniformInt": "StatelessRandomUniformInt",
}


def seeded(nodes: Iterable[NodeDef]) -> list[NodeDef]:
    """Replace random operations by stateless ones, each with its own seed derived from ``SEED``."""
    result = []
    for number, node in enumerate(nodes):
        if node.op not in _STATELESS:
            result.append(node)
            continue
        offset = NodeDef(name=f"{node.name}/seed_offset", op="Const")
        offset.attr["dtype"].type = DT_INT32
        offset.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([number, 0], tf.int32))
        seed = NodeDef(name=f"{node.name}/seed", op="Add", input=[SEED, offset.name])
        seed.attr["T"].type = DT_INT32
        shape, *limits = node.input
        drawn = NodeDef(name=node.name, op=_STATELESS[node.op], input=[shape, seed.name, *limits])
        drawn.attr["T"].CopyFrom(node.attr["T"])
        drawn.attr["Tseed"].type = DT_INT32
        drawn.attr["dtype"].type = node.attr["Tout" if limits else "dtype"].type
        result += [offset, seed, drawn]
    return result


def is_seeded(graph_def: GraphDef) -> bool:
    """Whether a graph uses ``SEED``."""
    return any(SEED in node.input for node in graph_def.node)
