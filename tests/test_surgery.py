import pytest
import tensorflow as tf

from transfer import surgery

tf1 = tf.compat.v1


def graph_def_of(build) -> tf1.GraphDef:
    graph = tf.Graph()
    with graph.as_default():
        build()
    return graph.as_graph_def(add_shapes=True)


def branched() -> None:
    x = tf1.placeholder(tf.float32, [None, 4], name="x")
    a = tf.nn.relu(x, name="a")
    b = tf.tanh(a, name="b")
    tf.add(b, a, name="tap")
    tf.sigmoid(b, name="aside")


@pytest.mark.parametrize(
    ("name", "expected"), [("a", ("a", 0)), ("s/a:2", ("s/a", 2)), ("a:x", ("a:x", 0))]
)
def test_split_tensor_name(name, expected):
    assert surgery.split_tensor_name(name) == expected


def test_ancestors_leave_out_what_the_tap_does_not_need():
    names = [node.name for node in surgery.ancestors(graph_def_of(branched), "tap:0")]
    assert names == ["x", "a", "b", "tap"]


def test_ancestors_stop_at_the_input():
    nodes = surgery.ancestors(graph_def_of(branched), "tap", stop_at=["a:0"])
    assert [node.name for node in nodes] == ["b", "tap"]


def test_ancestors_of_a_cyclic_graph_end():
    graph_def = graph_def_of(branched)
    next(node for node in graph_def.node if node.name == "a").input[0] = "tap"
    assert len(surgery.ancestors(graph_def, "tap")) == 3


def test_ancestors_name_a_node_that_is_missing():
    graph_def = graph_def_of(branched)
    graph_def.node[1].input[0] = "gone"
    with pytest.raises(ValueError, match="damaged: it refers to 'gone'"):
        surgery.ancestors(graph_def, "tap")


@pytest.mark.parametrize("use_resource", [False, True])
def test_extract_turns_variables_into_inputs(use_resource):
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf1.get_variable("layer/w", [4, 3], use_resource=use_resource)
        tf.matmul(x, w, name="tap")

    network = surgery.extract(graph_def_of(build), "tap", "x")
    assert network.variables == (surgery.Variable("layer/w", tf.float32, (4, 3)),)
    assert [node.name for node in network.graph_def.node] == ["tap"]
    assert list(network.graph_def.node[0].input) == ["x", "layer/w:0"]


def test_extract_names_placeholders_without_a_value():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.multiply(x, tf1.placeholder(tf.float32, name="Placeholder_2"), name="tap")

    with pytest.raises(ValueError, match="depends on Placeholder_2:0; give each a value"):
        surgery.extract(graph_def_of(build), "tap", "x")
    fed = surgery.extract(graph_def_of(build), "tap", "x", feeds={"Placeholder_2:0": 2.0})
    assert {node.op for node in fed.graph_def.node} == {"Const", "Mul"}


def test_extract_refuses_to_feed_what_is_no_placeholder():
    with pytest.raises(ValueError, match="cannot feed 'a': it is a Relu"):
        surgery.extract(graph_def_of(branched), "tap", "x", feeds={"a:0": 1.0})
    with pytest.raises(ValueError, match=r"cannot feed \['nobody'\]"):
        surgery.extract(graph_def_of(branched), "tap", "x", feeds={"nobody": 1.0})


def test_extract_refuses_a_tap_that_does_not_depend_on_the_input():
    def build():
        tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.add(tf.zeros([2]), 1.0, name="tap")

    with pytest.raises(ValueError, match="'tap' does not depend on the input 'x'"):
        surgery.extract(graph_def_of(build), "tap", "x")


def test_cut_parts_the_nodes():
    network = surgery.extract(graph_def_of(branched), "tap", "x")
    first, second = surgery.cut(network, "a")
    assert [node.name for node in first.graph_def.node] == ["a"]
    assert [node.name for node in second.graph_def.node] == ["b", "tap"]
    assert (second.input, second.output) == ("a:0", "tap:0")


def test_cut_names_the_branch_that_goes_round_it():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.add(tf.nn.relu(x, name="inner"), x, name="tap")

    network = surgery.extract(graph_def_of(build), "tap", "x")
    with pytest.raises(ValueError, match="branch goes round it, from 'x:0' through 'tap'"):
        surgery.cut(network, "inner")


def test_cut_refuses_a_tensor_that_is_not_in_between():
    network = surgery.extract(graph_def_of(branched), "tap", "x")
    with pytest.raises(ValueError, match="'aside:0': it is not between the input and the tap"):
        surgery.cut(network, "aside")


def test_control_dependencies_do_not_hinder_a_cut():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        early = tf.nn.relu(x, name="early")
        middle = tf.tanh(early, name="middle")
        with tf.control_dependencies([early]):
            tf.sigmoid(middle, name="tap")

    network = surgery.extract(graph_def_of(build), "tap", "x")
    first, second = surgery.cut(network, "middle")
    edges = [e for part in (first, second) for n in part.graph_def.node for e in n.input]
    assert not any(edge.startswith("^") for edge in edges)


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


def test_conditionals_keep_the_dependencies_that_choose_the_branch():
    def build():
        tf1.disable_control_flow_v2()
        try:
            x = tf1.placeholder(tf.float32, [None, 4], name="x")
            is_positive = tf.greater(tf.reduce_sum(x), 0.0)
            chosen = tf1.cond(is_positive, lambda: tf.constant(1.0), lambda: tf.constant(-1.0))
            tf.multiply(x, chosen, name="tap")
        finally:
            tf1.enable_control_flow_v2()

    from transfer.backbone import as_function

    run = as_function(surgery.extract(graph_def_of(build), "tap", "x"))
    for value in (2.0, -3.0):
        assert run(tf.fill([1, 4], value), []).numpy().tolist() == [[abs(value)] * 4]
