"""Replaced ``Switch`` and ``Merge`` compared with a session that runs them."""

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, assert_equals_stock, images

from transfer.graph import ancestors, conditionals, extract

tf1 = tf.compat.v1
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0])


def x_of(width=4):
    return tf1.placeholder(tf.float32, [None, width], name="x")


def ops(network):
    return {node.op for node in network.graph_def.node}


def weights(name, *shape):
    return tf1.get_variable(name, shape, use_resource=False)


@SIGNS
@pytest.mark.parametrize("use_resource", [False, True])
def test_variables_in_both_branches_equal_session(sign, use_resource):
    def build():
        x = x_of()
        a = tf1.get_variable("a", [4, 3], use_resource=use_resource)
        b = tf1.get_variable("b", [4, 3], use_resource=use_resource)
        y = tf1.cond(tf.reduce_sum(x) > 0, lambda: tf.matmul(x, a), lambda: tf.matmul(x, b) - 1.0)
        tf.nn.relu(y, name="tap")

    program = Program(build)
    assert not ops(program.network()) & {"Switch", "Merge", "RefSwitch", "RefMerge"}
    assert_equals_stock(program, sign * np.abs(images(3, 4)))


@SIGNS
def test_conditional_with_several_results_equals_session(sign):
    def build():
        x = x_of()
        first, second = tf1.cond(
            tf.reduce_sum(x) > 0, lambda: (tf.exp(-x), x), lambda: (tf.tanh(x), -x)
        )
        tf.add(first, 3.0 * second, name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


@SIGNS
def test_constants_in_both_branches_equal_session(sign):
    def build():
        x = x_of()
        scale = tf1.cond(tf.reduce_sum(x) > 0, lambda: tf.constant(2.0), lambda: tf.constant(3.0))
        tf.multiply(x, scale, name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


@SIGNS
@pytest.mark.parametrize("constant_if", [True, False])
def test_constant_in_one_branch_equals_session(sign, constant_if):
    def build():
        x = x_of()
        branches = [lambda: tf.reduce_sum(x, axis=0), lambda: tf.constant([1.0, 2.0, 3.0, 4.0])]
        y = tf1.cond(tf.reduce_sum(x) > 0, *(branches[::-1] if constant_if else branches))
        tf.add(x, y, name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


@pytest.mark.parametrize("shift", [-5.0, 0.3, 5.0])
def test_nested_conditionals_equal_session(shift):
    def build():
        x = x_of()
        w = weights("w", 4, 4)
        mean = tf.reduce_mean(x)
        inner = lambda: tf1.cond(mean > 1.0, lambda: tf.matmul(x, w), lambda: x + 1.0)  # noqa: E731
        tf.identity(tf1.cond(mean > 0, inner, lambda: -x), name="tap")

    assert_equals_stock(Program(build), images(3, 4) * 0.1 + shift)


@SIGNS
def test_conditional_nested_on_same_predicate_equals_session(sign):
    def build():
        x = x_of()
        positive = tf.reduce_sum(x) > 0
        inner = lambda: tf1.cond(positive, lambda: 2.0 * x, lambda: 3.0 * x)  # noqa: E731
        tf.identity(tf1.cond(positive, inner, lambda: 5.0 * x), name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


@SIGNS
def test_consecutive_conditionals_equal_session(sign):
    def build():
        x = x_of()
        positive = tf.reduce_sum(x) > 0
        y = tf1.cond(positive, lambda: 2.0 * x, lambda: 3.0 + x)
        y = tf1.cond(positive, lambda: tf.tanh(y), lambda: y * y)
        y = tf1.cond(tf.reduce_sum(y) > 0, lambda: y + x, lambda: y - x)
        tf.identity(y, name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


@pytest.mark.parametrize("shift", [-5.0, 0.3, 5.0])
def test_case_equals_session(shift):
    def build():
        x = x_of()
        mean = tf.reduce_mean(x)
        y = tf1.case(
            [(mean > 1.0, lambda: tf.exp(-x)), (mean > 0.0, lambda: x * 2.0)],
            default=lambda: tf.tanh(x),
            exclusive=False,
        )
        tf.identity(y, name="tap")

    assert_equals_stock(Program(build), images(3, 4) * 0.1 + shift)


@SIGNS
def test_value_index_of_merge_can_be_used(sign):
    def build():
        x = x_of()
        positive = tf.reduce_sum(x) > 0
        off, on = tf1.raw_ops.Switch(data=x, pred=positive)
        merged = tf1.raw_ops.Merge(inputs=[off * 2.0, on * 3.0])
        tf.multiply(merged.output, 1.0 + tf.cast(merged.value_index, tf.float32), name="tap")

    program = Program(build)
    assert_equals_stock(program, sign * np.abs(images(3, 4)))


def test_value_index_of_merge_with_known_predicate():
    def build():
        x = x_of()
        off, on = tf1.raw_ops.Switch(data=x, pred=tf.constant(True))
        merged = tf1.raw_ops.Merge(inputs=[off, tf.exp(on)])
        tf.add(merged.output, tf.cast(merged.value_index, tf.float32), name="tap")

    program = Program(build)
    x = images(3, 4)
    assert_close(program.layer()(x), program.run(x))


@SIGNS
def test_ref_switches_equal_session(sign):
    def build():
        x = x_of()
        w = weights("w", 4, 4)
        positive = tf.reduce_sum(x) > 0
        off, on = tf1.raw_ops.RefSwitch(data=w._ref(), pred=positive)
        merged = tf1.raw_ops.Merge(inputs=[tf.identity(off) * 2.0, tf.identity(on)])
        tf.matmul(x, merged.output, name="tap")

    program = Program(build)
    assert "RefSwitch" in {n.op for n in program.graph_def.node}
    x = sign * np.abs(images(3, 4))
    layer = program.layer()
    assert layer.variable_names == ["w"]
    assert_close(layer(x), program.run(x))


@pytest.mark.parametrize("value", [True, False])
def test_known_predicate_removes_other_branch(value):
    def build():
        x = x_of()
        w = weights("w", 4, 4)
        known = tf1.placeholder(tf.bool, [], name="known")
        tf.identity(tf1.cond(known, lambda: tf.matmul(x, w), lambda: tf.exp(x)), name="tap")

    program = Program(build)
    network = program.network(feeds={"known": value})
    assert ops(network) & {"MatMul", "Exp", "SelectV2"} == {"MatMul" if value else "Exp"}
    assert [v.name for v in network.variables] == ["w"] * value
    assert_equals_stock(program, images(3, 4), {"known:0": value}, network)


PREDICATES = {
    "not": lambda p: tf.logical_not(p),
    "and": lambda p: tf.logical_and(p, tf.constant(True)),
    "or": lambda p: tf.logical_or(tf.constant(False), p),
    "equal": lambda p: tf.equal(tf.cast(p, tf.int32), 1),
    "not equal": lambda p: tf.not_equal(tf.cast(p, tf.int32), 1),
    "greater": lambda p: tf.greater(tf.cast(p, tf.float32), 0.5),
    "less or equal": lambda p: tf.less_equal(tf.cast(p, tf.int64), tf.constant(0, tf.int64)),
    "reshaped": lambda p: tf.squeeze(tf.reshape(p, [1, 1])),
}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("predicate", PREDICATES)
def test_predicates_computed_from_constants_are_known(predicate, value):
    def build():
        x = x_of()
        known = tf1.placeholder(tf.bool, [], name="known")
        chosen = PREDICATES[predicate](known)
        tf.identity(tf1.cond(chosen, lambda: tf.tanh(x), lambda: tf.exp(x)), name="tap")

    program = Program(build)
    network = program.network(feeds={"known": value})
    assert len(ops(network) & {"Tanh", "Exp"}) == 1
    assert_equals_stock(program, images(3, 4), {"known:0": value}, network)


def test_non_scalar_predicate_is_unknown():
    nodes = Program(lambda: tf.constant([True, False], name="p")).graph_def.node
    assert conditionals.known_value({n.name: n for n in nodes}, "p") is None


def dropout(x, keep_prob):
    """As built by TensorFlow before 1.13."""
    return x / keep_prob * tf.floor(keep_prob + tf1.random_uniform(tf.shape(x)))


def batch_norm(x, is_training):
    """As built by tf.layers without fused batch norm."""
    width = x.shape[-1]
    ones, zeros = tf1.ones_initializer(), tf1.zeros_initializer()
    gamma = tf1.get_variable("gamma", [width], initializer=ones, use_resource=False)
    beta = tf1.get_variable("beta", [width], initializer=zeros, use_resource=False)
    statistics = [
        tf1.get_variable(name, [width], trainable=False, use_resource=False)
        for name in ("moving_mean", "moving_variance")
    ]
    moments = tf.nn.moments(x, list(range(len(x.shape) - 1)))
    mean, variance = (
        tf1.cond(is_training, lambda a=a: a, lambda b=b: b)
        for a, b in zip(moments, (statistics[0], tf.square(statistics[1])), strict=True)
    )
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)


def test_dropout_and_batch_norm_in_conditionals():
    def build():
        x = x_of()
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        h = batch_norm(tf.matmul(x, weights("w", 4, 6)), is_training)
        h = tf.nn.relu(h)
        tf.identity(tf1.cond(is_training, lambda: dropout(h, 0.5), lambda: h), name="tap")

    program = Program(build)
    network = program.network()
    assert [v.name for v in network.variables if not v.trainable] == [
        "moving_mean",
        "moving_variance",
    ]
    assert not ops(network) & {"RandomUniform", "StatelessRandomUniform", "Mean", "SelectV2"}
    assert_equals_stock(program, images(3, 4), {"is_training:0": False})


def test_fused_batch_norm_in_branches():
    def build():
        x = tf1.placeholder(tf.float32, [None, 5, 5, 3], name="x")
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        statistics = [weights(name, 3) for name in ("gamma", "beta", "m")]
        variance = tf1.get_variable("v", initializer=[0.5, 1.0, 2.0], use_resource=False)
        norm = tf1.nn.fused_batch_norm
        y = tf1.cond(
            is_training,
            lambda: norm(x, *statistics[:2], is_training=True)[0],
            lambda: norm(x, *statistics, variance, is_training=False)[0],
        )
        tf.nn.relu(y, name="tap")

    program = Program(build)
    network = program.network()
    assert {v.name for v in network.variables if not v.trainable} == {"m", "v"}
    assert_equals_stock(program, images(2, 5, 5, 3), {"is_training:0": False}, network)


def test_tap_inside_branch():
    """A session has no value for it if the other branch is taken; a layer has one."""

    def build():
        x = x_of()
        y = tf1.cond(tf.reduce_sum(x) > 0, lambda: tf.exp(x, name="inside") + 1.0, lambda: x)
        tf.identity(y, name="tap")

    program = Program(build)
    (inside,) = [n.name for n in program.graph_def.node if n.name.endswith("inside")]
    x = images(3, 4)
    for sign in (1.0, -1.0):
        assert_close(program.layer(tap=inside)(sign * x), np.exp(sign * x))


def test_loop_is_rejected():
    def build():
        x = x_of()
        y = tf1.while_loop(lambda v: tf.reduce_sum(v) < 100.0, lambda v: v * 2.0, [tf.abs(x) + 1.0])
        tf.identity(y, name="tap")

    with pytest.raises(ValueError, match="'tap' is inside of, or depends on, a while loop"):
        Program(build).network()


def test_loop_after_the_tap_is_ignored():
    def build():
        tap = tf.tanh(x_of(), name="tap")
        tf1.while_loop(lambda v: tf.reduce_sum(v) < 9.0, lambda v: v * 2.0, [tf.abs(tap) + 1.0])

    assert_equals_stock(Program(build), images(3, 4))


def test_resolve_does_not_modify_nodes():
    def build():
        x = x_of()
        y = tf1.cond(tf.reduce_sum(x) > 0, lambda: 2.0 * x, lambda: 3.0 * x)
        tf.identity(y, name="tap")

    graph_def = Program(build).graph_def
    before = graph_def.SerializeToString(deterministic=True)
    nodes = ancestors(graph_def.node, "tap", stop_at=["x"])
    conditionals.resolve(nodes, ["tap:0"])
    assert graph_def.SerializeToString(deterministic=True) == before


def nested(depth):
    """Nested switches, each with its own predicate, merged from the inside out."""
    graph = tf.Graph()
    with graph.as_default():
        x = x_of()
        net, merges = x, []
        for i in range(depth):
            positive = tf.reduce_any(x > float(i))
            outer, net = tf.raw_ops.Switch(data=net, pred=positive)
            merges.append(outer)
        for outer in reversed(merges):
            net = tf.raw_ops.Merge(inputs=[outer, net + 1.0])[0]
        tf.nn.relu(net, name="tap")
    return graph.as_graph_def()


def test_deeply_nested_conditionals_are_rejected(monkeypatch):
    monkeypatch.setattr(conditionals, "MAX_BRANCHES", 10_000)
    network = extract(nested(20), "tap", "x")
    assert not ops(network) & {"Switch", "Merge"}
    with pytest.raises(ValueError, match="nests conditionals too deeply"):
        extract(nested(200), "tap", "x")


def test_nodes_share_branch_mappings():
    """So that a long branch takes no more memory than a short one."""
    graph = tf.Graph()
    with graph.as_default():
        x = x_of()
        net = tf.raw_ops.Switch(data=x, pred=tf.reduce_any(x > 0.0))[1]
        for _ in range(5):
            net = net + 1.0
    lives = conditionals.branches(graph.as_graph_def().node)
    inside = [branches for branches in lives.values() if branches]
    assert len(inside) == 5
    assert len({id(branches) for branches in inside}) == 1
