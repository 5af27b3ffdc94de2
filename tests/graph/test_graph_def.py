import pytest
import tensorflow as tf
from conftest import branched, graph_def_of
from stock import control_flow_v1

from transfer.graph import (
    ancestors,
    canonical,
    check,
    data_inputs,
    downstream,
    dtype_of,
    graph_def,
    operation_of,
    placeholders,
    split_tensor_name,
    static_shape,
)

tf1 = tf.compat.v1


@pytest.mark.parametrize(
    ("name", "expected"), [("a", ("a", 0)), ("s/a:2", ("s/a", 2)), ("a:x", ("a:x", 0))]
)
def test_split_tensor_name(name, expected):
    assert split_tensor_name(name) == expected


def test_ancestors_exclude_unneeded_nodes():
    names = [node.name for node in ancestors(graph_def_of(branched).node, "tap:0")]
    assert names == ["x", "a", "b", "tap"]


def test_ancestors_stop_at_the_input():
    nodes = ancestors(graph_def_of(branched).node, "tap", stop_at=["a:0"])
    assert [node.name for node in nodes] == ["b", "tap"]


def test_cyclic_graph_is_rejected():
    graph_def = graph_def_of(branched)
    next(node for node in graph_def.node if node.name == "a").input[0] = "tap"
    with pytest.raises(ValueError, match="damaged: .* depend on each other in a cycle"):
        ancestors(graph_def.node, "tap")


def test_ancestors_report_missing_node():
    graph_def = graph_def_of(branched)
    graph_def.node[1].input[0] = "gone"
    with pytest.raises(ValueError, match="damaged: it refers to 'gone'"):
        ancestors(graph_def.node, "tap")


def test_dtype_of_an_output_is_not_that_of_the_operand():
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 4], name="x")
        tf.argmax(x, name="most", output_type=tf.int32)
        tf.shape(x, out_type=tf.int64, name="shape")
    nodes = {node.name: node for node in graph.as_graph_def().node}
    assert dtype_of(nodes["most"]) == tf.int32 and dtype_of(nodes["shape"]) == tf.int64
    del nodes["most"].attr["output_type"]
    assert dtype_of(nodes["most"]) == tf.int64  # the default


def test_shape_and_dtype_of_later_output():
    def build():
        queue = tf1.FIFOQueue(1, [tf.int64, tf.float32], [[], [8, 8, 3]])
        queue.dequeue_many(4, name="batch")

    node = next(n for n in graph_def_of(build).node if n.name == "batch")
    assert static_shape(node, 1) == (4, 8, 8, 3)
    assert [dtype_of(node, index) for index in (0, 1)] == [tf.int64, tf.float32]


def test_static_shape_of_old_placeholders_comes_from_output_shapes():
    graph_def = graph_def_of(lambda: tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x"))
    node = graph_def.node[0]
    node.attr["shape"].shape.Clear()
    assert static_shape(node) == (None, 8, 8, 3)
    del node.attr["_output_shapes"]
    assert static_shape(node) is None


@pytest.mark.parametrize(
    ("name", "expected"), [("a", "a:0"), ("a:0", "a:0"), ("s/a:2", "s/a:2"), ("^a", "^a")]
)
def test_canonical_names(name, expected):
    assert canonical(name) == expected


@pytest.mark.parametrize("edge", ["s/a", "s/a:2", "^s/a"])
def test_operation_of_edges(edge):
    assert operation_of(edge) == "s/a"


def test_data_inputs_exclude_control_dependencies():
    node = tf1.NodeDef(name="n", input=["a", "b:1", "^c"])
    assert data_inputs(node) == ["a", "b:1"]


def two_outputs():
    x = tf1.placeholder(tf.float32, [None, 4], name="x")
    first, second = tf.split(x, 2, axis=1, name="halves")
    tf.add(tf.nn.relu(first, name="left"), tf.tanh(second, name="right"), name="tap")


def test_ancestors_stop_at_one_output_of_several():
    nodes = ancestors(graph_def_of(two_outputs).node, "tap", stop_at=["halves:1"])
    assert {node.name for node in nodes} >= {"x", "halves", "left", "right", "tap"}
    nodes = ancestors(graph_def_of(two_outputs).node, "tap", stop_at=["halves", "halves:1"])
    assert {node.name for node in nodes} == {"left", "right", "tap"}


def test_input_has_no_ancestors():
    assert ancestors(graph_def_of(branched).node, "a", stop_at=["a:0"]) == []


def test_downstream_contains_dependent_operations():
    nodes = ancestors(graph_def_of(two_outputs).node, "tap")
    assert downstream(nodes, ["halves"]) == {"left", "tap"}
    assert downstream(nodes, ["halves:1"]) == {"right", "tap"}
    assert downstream(nodes, ["x"]) == {"halves", "left", "right", "tap"}
    assert downstream(nodes, ["tap"]) == set()


def test_placeholders_with_a_default_need_not_be_fed():
    def build():
        tf1.placeholder(tf.float32, name="must")
        tf1.placeholder_with_default(1.0, [], name="may")

    assert [node.name for node in placeholders(graph_def_of(build).node)] == ["must"]


def test_loop_is_rejected_with_node_name():
    def build():
        x = tf1.placeholder(tf.float32, [], name="x")
        tf.identity(tf1.while_loop(lambda v: v < 9, lambda v: v * 2, [x]), name="tap")

    with control_flow_v1(), pytest.raises(ValueError, match=r"while loop \(node 'while/"):
        ancestors(graph_def_of(build).node, "tap")


@pytest.mark.parametrize("shape", [None, [], [3], [None, 3]])
@pytest.mark.parametrize("add_shapes", [True, False])
def test_static_shape_equals_that_of_program(shape, add_shapes):
    with tf.Graph().as_default() as graph:
        tf1.placeholder(tf.float32, shape, name="x")
    (node,) = graph.as_graph_def(add_shapes=add_shapes).node
    expected = None if shape is None else tuple(shape)
    # An empty shape attribute may mean a scalar, or nothing (TensorFlow 1.1).
    assert static_shape(node) == (None if shape == [] and not add_shapes else expected)


def test_shape_and_dtype_of_iterator_outputs():
    def build():
        dataset = tf.data.Dataset.from_tensors((tf.zeros([8, 8, 3]), tf.zeros([], tf.int64)))
        tf1.data.make_one_shot_iterator(dataset.batch(4, drop_remainder=True)).get_next("batch")

    node = next(n for n in graph_def_of(build).node if n.name == "batch")
    assert [static_shape(node, index) for index in (0, 1)] == [(4, 8, 8, 3), (4,)]
    assert [dtype_of(node, index) for index in (0, 1)] == [tf.float32, tf.int64]


def test_unknown_dtype_is_rejected():
    node = tf1.NodeDef(name="n", op="Placeholder")
    node.attr["dtype"].type = 12345
    with pytest.raises(ValueError, match="damaged: 'n' has the unknown dtype enum 12345"):
        dtype_of(node)


def test_dtype_is_none_if_not_stated():
    assert dtype_of(tf1.NodeDef(name="n", op="NoOp")) is None
    assert static_shape(tf1.NodeDef(name="n", op="NoOp")) is None


@pytest.mark.parametrize("name", ["a", ""])
def test_empty_and_duplicate_names_are_rejected(name):
    nodes = [tf1.NodeDef(name="a", op="NoOp"), tf1.NodeDef(name=name, op="NoOp")]
    with pytest.raises(ValueError, match=f"damaged: two nodes are named '{name}'"):
        check(nodes)


def test_missing_input_is_rejected():
    graph_def = graph_def_of(branched)
    check(graph_def.node)
    node = next(node for node in graph_def.node if node.name == "tap")
    node.input[1] = "^a"
    with pytest.raises(ValueError, match=r"'tap' is a AddV2, which takes 2 inputs, and has 1"):
        check(graph_def.node)


def test_too_many_outputs_are_rejected():
    graph_def = graph_def_of(two_outputs)
    check(graph_def.node)
    next(node for node in graph_def.node if node.name == "halves").attr["num_split"].i = 10**9
    with pytest.raises(ValueError, match="'halves' has 1000000000 outputs; at most"):
        check(graph_def.node)


def test_origin_follows_first_inputs():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        h = tf.identity(tf.reshape(tf.exp(x, name="exp"), [-1]), name="copy")
        tf.add(h, 1.0, name="tap")

    nodes = {node.name: node for node in graph_def_of(build).node}
    through = {"Identity", "Reshape"}
    assert graph_def.origin(nodes, "copy:0", through).name == "exp"
    assert graph_def.origin(nodes, "tap", through).name == "tap"
    assert graph_def.origin(nodes, "gone", through) is None
    del nodes["exp"]
    assert graph_def.origin(nodes, "copy:0", through) is None


def test_consumers_are_users_of_a_tensor():
    users = graph_def.consumers(graph_def_of(branched).node)
    assert [node.name for node in users["a"]] == ["b", "tap"]
    assert "tap" not in users


def test_num_elements_follows_stated_shape():
    (node,) = graph_def_of(lambda: tf.constant(1.0, shape=[3, 4])).node
    assert graph_def.num_elements(node) == 12
    node.attr["value"].tensor.tensor_shape.dim[0].size = -1
    assert graph_def.num_elements(node) == 0
