import pytest
import tensorflow as tf
from conftest import branched, graph_def_of

from transfer import surgery

tf1 = tf.compat.v1


@pytest.mark.parametrize(
    ("name", "expected"), [("a", ("a", 0)), ("s/a:2", ("s/a", 2)), ("a:x", ("a:x", 0))]
)
def test_split_tensor_name(name, expected):
    assert surgery.split_tensor_name(name) == expected


def test_ancestors_leave_out_what_the_tap_does_not_need():
    names = [node.name for node in surgery.ancestors(graph_def_of(branched).node, "tap:0")]
    assert names == ["x", "a", "b", "tap"]


def test_ancestors_stop_at_the_input():
    nodes = surgery.ancestors(graph_def_of(branched).node, "tap", stop_at=["a:0"])
    assert [node.name for node in nodes] == ["b", "tap"]


def test_a_graph_that_goes_in_circles_is_damaged():
    graph_def = graph_def_of(branched)
    next(node for node in graph_def.node if node.name == "a").input[0] = "tap"
    with pytest.raises(ValueError, match="damaged: .* depend on each other in a circle"):
        surgery.ancestors(graph_def.node, "tap")


def test_ancestors_name_a_node_that_is_missing():
    graph_def = graph_def_of(branched)
    graph_def.node[1].input[0] = "gone"
    with pytest.raises(ValueError, match="damaged: it refers to 'gone'"):
        surgery.ancestors(graph_def.node, "tap")


def test_shape_and_type_of_a_later_output():
    def build():
        queue = tf1.FIFOQueue(1, [tf.int64, tf.float32], [[], [8, 8, 3]])
        queue.dequeue_many(4, name="batch")

    node = next(n for n in graph_def_of(build).node if n.name == "batch")
    assert surgery.static_shape(node, 1) == (4, 8, 8, 3)
    assert [surgery.dtype_of(node, index) for index in (0, 1)] == [tf.int64, tf.float32]


def test_static_shape_of_old_placeholders_comes_from_output_shapes():
    graph_def = graph_def_of(lambda: tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x"))
    node = graph_def.node[0]
    node.attr["shape"].shape.Clear()
    assert surgery.static_shape(node) == (None, 8, 8, 3)
    del node.attr["_output_shapes"]
    assert surgery.static_shape(node) is None
