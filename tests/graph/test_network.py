import pytest
import tensorflow as tf
from conftest import branched, graph_def_of

from transfer.graph import Variable, cut, extract

tf1 = tf.compat.v1


@pytest.mark.parametrize("use_resource", [False, True])
def test_extract_turns_variables_into_inputs(use_resource):
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf1.get_variable("layer/w", [4, 3], use_resource=use_resource)
        tf.matmul(x, w, name="tap")

    network = extract(graph_def_of(build), "tap", "x")
    assert network.variables == (Variable("layer/w", tf.float32, (4, 3)),)
    assert [node.name for node in network.graph_def.node] == ["tap"]
    assert list(network.graph_def.node[0].input) == ["x", "layer/w:0"]


def test_extract_names_placeholders_without_a_value():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.multiply(x, tf1.placeholder(tf.float32, name="Placeholder_2"), name="tap")

    with pytest.raises(ValueError, match="depends on Placeholder_2:0; give each a value"):
        extract(graph_def_of(build), "tap", "x")
    fed = extract(graph_def_of(build), "tap", "x", feeds={"Placeholder_2:0": 2.0})
    assert {node.op for node in fed.graph_def.node} == {"Const", "Mul"}


def test_extract_rejects_feeding_other_operations():
    with pytest.raises(ValueError, match="cannot feed 'a': it is a Relu"):
        extract(graph_def_of(branched), "tap", "x", feeds={"a:0": 1.0})
    with pytest.raises(ValueError, match=r"cannot feed \['nobody'\]"):
        extract(graph_def_of(branched), "tap", "x", feeds={"nobody": 1.0})


def test_extract_rejects_tap_independent_of_input():
    def build():
        tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.add(tf.zeros([2]), 1.0, name="tap")

    with pytest.raises(ValueError, match="'tap' does not depend on the input 'x'"):
        extract(graph_def_of(build), "tap", "x")


def test_cut_partitions_the_nodes():
    network = extract(graph_def_of(branched), "tap", "x")
    first, second = cut(network, "a")
    assert [node.name for node in first.graph_def.node] == ["a"]
    assert [node.name for node in second.graph_def.node] == ["b", "tap"]
    assert (second.input, second.output) == ("a:0", "tap:0")


def test_cut_error_names_the_bypassing_branch():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.add(tf.nn.relu(x, name="inner"), x, name="tap")

    network = extract(graph_def_of(build), "tap", "x")
    with pytest.raises(ValueError, match="branch bypasses it, from 'x:0' through 'tap'"):
        cut(network, "inner")


def test_cut_rejects_tensor_outside_of_network():
    network = extract(graph_def_of(branched), "tap", "x")
    with pytest.raises(ValueError, match="'aside:0': it is not between the input and the tap"):
        cut(network, "aside")


def test_cut_ignores_control_dependencies():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        early = tf.nn.relu(x, name="early")
        middle = tf.tanh(early, name="middle")
        with tf.control_dependencies([early]):
            tf.sigmoid(middle, name="tap")

    network = extract(graph_def_of(build), "tap", "x")
    first, second = cut(network, "middle")
    edges = [e for part in (first, second) for n in part.graph_def.node for e in n.input]
    assert not any(edge.startswith("^") for edge in edges)


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

    from transfer.graph.network_function import as_function

    run = as_function(extract(graph_def_of(build), "tap", "x"))
    for value in (2.0, -3.0):
        assert run(tf.fill([1, 4], value), [], None).numpy().tolist() == [[abs(value)] * 4]
