"""Regression tests: programs that gave wrong values or gradients, compared with a session."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import graph_def_of
from stock import Program, assert_close, assert_equals_stock, control_flow_v1, images
from tensorflow.core.framework.types_pb2 import DT_FLOAT

from transfer import Backbone, load_meta_graph
from transfer.graph import extract, inline, taps
from transfer.models import checkpoint

tf1 = tf.compat.v1
KEEP = 0.75


def x_of(width=4):
    return tf1.placeholder(tf.float32, [None, width], name="x")


def uniform(x):
    return tf.raw_ops.RandomUniform(shape=tf.shape(x), dtype=tf.float32)


def w_of(*shape, name="w"):
    return tf1.get_variable(name, shape, use_resource=False)


# conditionals and functions


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("conds", ["v1", "v2"])
def test_calls_without_arguments_in_both_branches(conds, sign):
    def build():
        x = x_of()
        f = tf.function(lambda: tf.constant(2.0), autograph=False)
        g = tf.function(lambda: tf.constant(3.0), autograph=False)
        tf.multiply(x, tf1.cond(tf.reduce_sum(x) > 0, lambda: f(), lambda: g()), name="tap")

    assert_equals_stock(Program(build, conds=conds), sign * np.abs(images(3, 4)))


def test_gradients_past_a_branch_that_is_not_taken_are_finite():
    def build():
        x = x_of()
        norm = tf.reduce_sum(x)
        tf.identity(tf1.cond(norm > 0, lambda: x / norm, lambda: 2.0 * x), name="tap")

    assert_equals_stock(Program(build), np.zeros([3, 4], np.float32))


def test_then_branch_may_call_else_branch():
    def build():
        x = x_of()
        tf.identity(tf1.cond(tf.reduce_sum(x) > 0, lambda: 2.0 * x, lambda: 3.0 * x), name="tap")

    graph_def = Program(build, conds="v2").graph.as_graph_def()
    node = next(n for n in graph_def.node if n.op == "StatelessIf")
    then, other = (node.attr[f"{b}_branch"].func.name for b in ("then", "else"))
    body = next(f for f in graph_def.library.function if f.signature.name == then)
    arguments = [a.name for a in body.signature.input_arg]
    call = body.node_def.add(name="call", op="PartitionedCall", input=arguments)
    call.attr["f"].func.name = other
    call.attr["Tin"].list.type.extend(a.type for a in body.signature.input_arg)
    call.attr["Tout"].list.type.append(DT_FLOAT)
    body.ret[body.signature.output_arg[0].name] = "call:output:0"
    inline(graph_def)


@pytest.mark.timeout(300)
def test_long_chain_of_ands_is_fast():
    def build():
        x = x_of()
        known = tf.constant(True)
        for _ in range(19):
            known = tf.logical_and(known, known)
        tf.identity(tf1.cond(known, lambda: 2.0 * x, lambda: x), name="tap")

    Program(build).network()


def node_of(graph_def, name, op, *inputs, dtype=DT_FLOAT):
    node = graph_def.node.add(name=name, op=op, input=inputs)
    node.attr["dtype" if op == "Placeholder" else "T"].type = dtype
    return node


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_products_of_long_identity_chain_are_fast():
    """A file of 150 kB."""
    graph_def = tf1.GraphDef()
    node_of(graph_def, "x", "Placeholder")
    for number in range(3000):
        node_of(graph_def, f"i{number}", "Identity", f"i{number - 1}" if number else "x")
    for number in range(3000):
        node_of(graph_def, f"m{number}", "Mul", f"m{number - 1}" if number else "x", "i2999")
    extract(graph_def, "m2999", "x")


@pytest.mark.timeout(300)
def test_ranking_of_cyclic_graph_terminates():
    def build():
        x = x_of()
        a = tf.reshape(x, tf.shape(x), name="a")
        b = tf.identity(a, name="b")
        tf.matmul(tf.multiply(x, b), w_of(4, 3), name="tap")

    graph_def = Program(build).graph.as_graph_def()
    next(n for n in graph_def.node if n.name == "a").input[0] = "b"
    taps.rank(list(graph_def.node), lambda names: True)


# dropout

INPUT_FORMS = {
    "1.13": lambda x: x * (1 / KEEP) * tf.cast(uniform(x) >= 1 - KEEP, tf.float32),
    "2.12": lambda x: tf1.nn.dropout(x, rate=1 - KEEP),
}


@pytest.mark.parametrize("form", INPUT_FORMS)
def test_dropout_of_input_is_bypassed(form):
    program = Program(lambda: tf.identity(INPUT_FORMS[form](x_of()), name="tap"))
    x = images(3, 4)
    assert_close(program.layer()(x), x)


def test_dropout_directly_after_input_is_bypassed(tmp_path):
    """Extracted with the input of dropout as the network's input."""

    def build():
        h = tf.exp(x_of(), name="h")
        tf.identity(tf1.nn.dropout(h, rate=0.5), name="tap")

    program = Program(build)
    network = extract(program.graph_def, "tap", "h", tf.float32)
    x = images(3, 4)
    assert_close(program.layer(network)(x), x)


def test_scale_unrelated_to_mask_is_kept():
    def build():
        h = tf.identity(x_of()) / 255.0
        tf.multiply(h, tf.floor(KEEP + uniform(h)), name="tap")

    x = images(3, 4)
    assert_close(Program(build).layer()(x), x / 255.0)


WHERES = {
    "zeros_like": lambda x: tf.where(uniform(x) < KEEP, x / KEEP, tf.zeros_like(x)),
    "Select, zeros_like": lambda x: tf.raw_ops.Select(
        condition=uniform(x) < KEEP, x=x / KEEP, y=tf.zeros_like(x)
    ),
    "Fill": lambda x: tf.where(uniform(x) < KEEP, x / KEEP, tf.fill(tf.shape(x), 0.0)),
    "zeros first": lambda x: tf.where(uniform(x) < 1 - KEEP, 0.0, x / KEEP),
}


@pytest.mark.parametrize("form", WHERES)
def test_other_forms_of_select_are_detected_as_dropout(form):
    program = Program(lambda: tf.identity(WHERES[form](tf.tanh(x_of())), name="tap"))
    x = images(3, 4)
    assert_close(program.layer()(x), np.tanh(x))


def test_zeros_of_dropout_are_not_weights():
    def build():
        h = tf.matmul(x_of(), w_of(4, 4))
        zeros = tf.constant(0.0, shape=[3, 4])
        dropped = tf.raw_ops.Select(condition=uniform(h) < KEEP, x=h / KEEP, y=zeros)
        tf.identity(dropped, name="tap")

    assert [v.name for v in Program(build).network().variables] == ["w"]


def test_stateless_dropout_is_bypassed():
    def build():
        h = tf.tanh(x_of())
        tf.identity(tf.nn.experimental.stateless_dropout(h, 0.5, seed=[1, 2]), name="tap")

    x = images(3, 4)
    assert_close(Program(build).layer()(x), np.tanh(x))


def test_variable_keep_prob_is_not_trainable():
    def build():
        h = tf.matmul(x_of(), w_of(4, 4))
        keep = tf1.get_variable("keep_prob", initializer=0.5, trainable=False)
        tf.multiply(h / keep, tf.floor(keep + uniform(h)), name="tap")

    network = Program(build).network()
    assert [v.name for v in network.variables if v.trainable] == ["w"]


# modes


def test_switch_stored_in_resource_variable_is_detected():
    def build():
        x = x_of()
        switch = tf1.get_variable("s", initializer=False, trainable=False, use_resource=True)
        dropped = lambda: tf1.nn.dropout(tf.tanh(x), rate=0.5)  # noqa: E731
        tf.identity(tf1.cond(switch, dropped, lambda: tf.tanh(x)), name="tap")

    assert_equals_stock(Program(build), images(3, 4))


def test_averages_of_the_moments_are_statistics():
    """Common custom batch norm: ``ema.average(batch_mean)`` is selected at inference."""

    def build():
        h = tf.matmul(x_of(), w_of(4, 5))
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        moments = tf.nn.moments(h, [0], name="moments")
        average = tf1.train.ExponentialMovingAverage(0.5)
        update = average.apply(list(moments))

        def in_training():
            with tf.control_dependencies([update]):
                return [tf.identity(moment) for moment in moments]

        mean, variance = tf1.cond(
            is_training, in_training, lambda: [average.average(m) for m in moments]
        )
        tf.nn.batch_normalization(h, mean, variance, None, None, 1e-3, name="tap")

    graph_def = graph_def_of(lambda: control(build))
    nodes = inline(graph_def)
    tap = next(n.name for n in nodes.node if n.name == "tap/add_1" or n.name == "tap/sub")
    tap = [n.name for n in nodes.node if n.name.startswith("tap/")][-1]
    network = extract(nodes, tap, "x")
    assert [v.name for v in network.variables if v.trainable] == ["w"]


def test_population_statistics_are_detected_by_use():
    def build():
        h = tf.matmul(x_of(), w_of(4, 5))
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        stored = [
            tf1.get_variable(n, [5], trainable=False, use_resource=False)
            for n in ("pop_mean", "pop_var")
        ]
        mean, variance = tf1.cond(
            is_training,
            lambda: list(tf.nn.moments(h, [0])),
            lambda: [tf.identity(s) for s in stored],
        )
        tf.identity(tf.nn.batch_normalization(h, mean, variance, None, None, 1e-3), name="tap")

    network = Program(build).network()
    assert [v.name for v in network.variables if v.trainable] == ["w"]


def control(build):
    with control_flow_v1():
        build()


@pytest.mark.parametrize("activation", [tf.identity, tf.nn.relu], ids=["bare", "relu"])
@pytest.mark.parametrize("fused", [False, True])
def test_norms_in_branches_use_moving_averages(fused, activation):
    """``tf.cond(is_training, lambda: batch_norm(x, True), lambda: batch_norm(x, False, reuse))``"""

    def norm(h, statistics, training):
        beta, gamma, mean, variance = statistics
        if fused:
            args = (h, gamma, beta) if training else (h, gamma, beta, mean, variance)
            return activation(tf1.nn.fused_batch_norm(*args, is_training=training)[0])
        if training:
            mean, variance = tf.nn.moments(h, [0, 1, 2])
        return activation(tf.nn.batch_normalization(h, mean, variance, beta, gamma, 1e-3))

    def build():
        x = tf1.placeholder(tf.float32, [None, 2, 2, 4], name="x")
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        statistics = [
            tf1.get_variable(n, initializer=np.abs(images(4, seed=i)) + 0.5, use_resource=False)
            for i, n in enumerate(("beta", "gamma", "moving_mean", "moving_variance"))
        ]
        y = tf1.cond(
            is_training, lambda: norm(x, statistics, True), lambda: norm(x, statistics, False)
        )
        tf.identity(y, name="tap")

    program = Program(build)
    layer = program.layer()
    x = images(5, 2, 2, 4)
    expected = program.run(x, {"is_training:0": False})
    assert_close(layer(x), expected)
    assert_close(layer(x, training=True), expected)


# constants


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_constants_are_weights(dtype):
    def build():
        x = x_of()
        w = tf.cast(tf.constant(images(4, 3), dtype, name="w"), tf.float32)
        tf.matmul(x, w, name="tap")

    assert [v.name for v in Program(build).network().variables] == ["w"]


# checkpoints


def test_moving_average_of_other_variable_is_not_used(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session, control_flow_v1():
        w = tf1.get_variable("w", initializer=np.full(3, 1.0, np.float32), use_resource=False)
        inner = tf1.get_variable(
            "net/w", initializer=np.full(3, 2.0, np.float32), use_resource=False
        )
        x = tf1.placeholder(tf.float32, [None, 3], name="x")
        tf.add(x * w, inner, name="tap")
        tf1.train.ExponentialMovingAverage(0.9).apply([inner])
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(tmp_path / "m"))
    graph = load_meta_graph(tmp_path / "m")
    values = graph.read(graph.network("tap").variables, use_ema=True)
    assert values["w"].numpy().tolist() == [1.0] * 3


def test_moving_average_with_custom_name_is_found(tmp_path):
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "m"),
        tensor_names=["w/my_ema"],
        shape_and_slices=[""],
        tensors=[[1.0]],
    )
    found = checkpoint.average_entries(["w"], checkpoint.Checkpoint(tmp_path / "m"))
    assert found == {"w": checkpoint.Entry("w/my_ema")}


# taps


def test_short_name_does_not_match_summary():
    def build():
        with tf1.variable_scope("net"), tf1.variable_scope("fc7"):
            h = tf.nn.relu(tf.matmul(x_of(), w_of(4, 3)), name="Relu")
        tf1.summary.histogram("fc7", h)
        tf.nn.softmax(h)

    assert taps.find(graph_def_of(build).node, "fc7") == ["net/fc7/Relu:0"]


# shapes


def test_padded_batches_use_different_dropout_masks():
    def build():
        x = tf1.placeholder(tf.float32, [7, 50], name="x")
        h = tf.exp(x) + 0.0 * tf.reshape(tf.range(350.0), [7, 50])
        tf.identity(tf1.nn.dropout(h, rate=tf1.placeholder(tf.float32)), name="tap")

    layer = Program(build).layer()
    assert layer.network.batch_size == 7
    dropped = layer(np.zeros([14, 50], np.float32), training=True).numpy() == 0.0
    assert (dropped[:7] != dropped[7:]).any()


def test_saved_model_without_weights_names_missing_file(tmp_path):
    import shutil

    with tf.Graph().as_default(), tf1.Session() as session:
        x = x_of()
        y = tf.matmul(x, w_of(4, 3), name="y")
        session.run(tf1.global_variables_initializer())
        tf1.saved_model.simple_save(session, str(tmp_path / "saved"), {"x": x}, {"y": y})
    shutil.rmtree(tmp_path / "saved" / "variables")
    with pytest.raises(FileNotFoundError, match="variables.index"):
        Backbone(load_meta_graph(tmp_path / "saved"), tap="y")


def test_weights_used_in_one_mode_only_are_kept():
    def build():
        x = x_of()
        switch = tf1.placeholder(tf.bool, [], name="is_training")
        a, b = w_of(4, 3, name="a"), w_of(4, 3, name="b")
        tf.identity(tf1.cond(switch, lambda: tf.matmul(x, a), lambda: tf.matmul(x, b)), name="tap")

    program = Program(build)
    layer, x = program.layer(), images(3, 4)
    for value in (False, True):
        assert_close(layer(x, training=value), program.run(x, {"is_training:0": value}))


@pytest.mark.timeout(300)
def test_deeply_nested_switches_are_rejected_quickly():
    """A file of 700 kB; each node belongs to all previous branches."""
    graph_def = tf1.GraphDef()
    node_of(graph_def, "x", "Placeholder")
    for number in range(8000):
        constant = graph_def.node.add(name=f"p{number}", op="Const")
        constant.attr["dtype"].type = tf.bool.as_datatype_enum
        constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(True))
        previous = f"s{number - 1}:1" if number else "x"
        node_of(graph_def, f"s{number}", "Switch", previous, f"p{number}")
    node_of(graph_def, "tap", "Relu", "s7999:1")
    with pytest.raises(ValueError, match="nests conditionals too deeply"):
        extract(graph_def, "tap", "x")
