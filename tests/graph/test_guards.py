"""Wrong ranks of inputs are rejected before shape inference reads the values."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import extract, guards, infer


def split_network(sizes, computed=False):
    """A ``SplitV`` with these sizes, which TensorFlow itself does not allow to build."""
    shape = (None, 8, 8, 3)
    graph = tf.Graph()
    with graph.as_default():
        images = tf.compat.v1.placeholder(tf.float32, shape, name="images")
        given = tf.constant([5, 3], name="sizes")
        if computed:
            given = tf.add(given, tf.constant([0], name="zero"))
        parts = tf.raw_ops.SplitV(
            value=images, size_splits=given, axis=1, num_split=2, name="split"
        )
        tf.identity(parts[0], name="tap")
    graph_def = graph.as_graph_def()
    (node,) = (node for node in graph_def.node if node.name == "sizes")
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(sizes, tf.int32))
    return extract(graph_def, "tap", "images", tf.float32, input_shape=shape)


@pytest.mark.parametrize("computed", [False, True])
def test_sizes_of_the_right_rank_are_read(computed):
    shapes = infer(split_network([5, 3], computed))
    assert shapes["tap:0"] == (None, 5, 8, 3)


def test_constant_of_wrong_rank_is_rejected():
    """It would crash the process in shape inference, which precedes all other checks."""
    expected = (
        r"'split' \(SplitV\) gets 'sizes' of shape \[1, 2\] as its size_splits; "
        r"expected 1 dimension$"
    )
    with pytest.raises(ValueError, match=expected):
        infer(split_network([[5, 3]]))


def test_wrong_inferred_rank_is_rejected():
    expected = r"must be rank 1 but is rank 2 for '.*split/guard_1/.*input shapes: \[1,2\]"
    with pytest.raises(ValueError, match=expected):
        infer(split_network([[5, 3]], computed=True))


INPUTS = [
    (op, number)
    for op in [*guards.RANKS, "FusedBatchNormV3"]
    for number, rank in enumerate(guards.ranks_of(NodeDef(op=op)))
    if rank is not None
]


@pytest.mark.parametrize(("op", "number"), INPUTS)
def test_wrong_known_rank_is_rejected(op, number):
    ranks = guards.ranks_of(NodeDef(op=op))
    graph_def = tf.compat.v1.GraphDef()
    graph_def.node.add(name="call", op=op, input=[f"in_{i}" for i in range(len(ranks))])
    shapes = {f"in_{i}:0": (1,) * (rank or 0) for i, rank in enumerate(ranks)}
    guards.check_ranks(graph_def, shapes)
    guards.check_ranks(graph_def, shapes | {f"in_{number}:0": None})
    rank = ranks[number]
    expected = rf"'call' \({op}\) gets 'in_{number}' of shape \[{'7, ' * rank}7\] as its \w+; "
    with pytest.raises(ValueError, match=f"{expected}expected {rank} dimension"):
        guards.check_ranks(graph_def, shapes | {f"in_{number}:0": (7,) * (rank + 1)})


def test_only_inputs_read_by_shape_functions_are_checked():
    network = split_network(np.array([5, 3]), computed=True)
    checked = guards.with_ranks(network.graph_def, {"split/axis:0": ()})
    added = {node.name for node in checked.node} - {node.name for node in network.graph_def.node}
    assert "split/guard_1/ranked" in added
    assert guards.with_ranks(network.graph_def, infer(network)) is network.graph_def
