"""Dropout in all forms built by TensorFlow versions."""

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, assert_equals_stock, images

from transfer.graph import downstream, find_dropout

tf1 = tf.compat.v1
KEEP = 0.75


def x_of(width=4):
    return tf1.placeholder(tf.float32, [None, width], name="x")


def uniform(x):
    """Like random_uniform of old versions: scaled, even from 0 to 1."""
    drawn = tf.raw_ops.RandomUniform(shape=tf.shape(x), dtype=tf.float32)
    low, high = tf.constant(0.0), tf.constant(1.0)
    return drawn * (high - low) + low


def rate(keep):
    return 1.0 - keep


# Functions of the values and the keep probability to the result of dropout.
FORMS = {
    "tf.nn.dropout": lambda x, keep: tf1.nn.dropout(x, rate=rate(keep)),
    "tf.nn.dropout, keep_prob": lambda x, keep: tf1.nn.dropout(x, keep_prob=keep),
    "tf.nn.dropout, noise_shape": lambda x, keep: tf1.nn.dropout(
        x, rate=rate(keep), noise_shape=[tf.shape(x)[0], 1]
    ),
    "0.5": lambda x, keep: x * (1.0 / keep) * tf.floor(keep + uniform(x)),
    "0.12, inverse": lambda x, keep: x * tf.raw_ops.Inv(x=keep) * tf.floor(keep + uniform(x)),
    "1.0, Div": lambda x, keep: tf.raw_ops.Div(x=x, y=keep) * tf.floor(uniform(x) + keep),
    "1.0, RealDiv": lambda x, keep: (x / keep) * tf.floor(keep + uniform(x)),
    "1.13": lambda x, keep: (
        x * (1.0 / (1.0 - rate(keep))) * tf.cast(uniform(x) >= rate(keep), tf.float32)
    ),
    "2.12": lambda x, keep: tf.where(uniform(x) >= rate(keep), x * (1.0 / keep), 0.0),
    "zeros first": lambda x, keep: tf.where(
        uniform(x) < rate(keep), tf.zeros_like(x), x * (1.0 / keep)
    ),
    "mask first": lambda x, keep: tf.floor(keep + uniform(x)) * (x / keep),
    "keep_prob first": lambda x, keep: x / keep * tf.cast(keep > uniform(x), tf.float32),
    "Less": lambda x, keep: x / keep * tf.cast(uniform(x) < keep, tf.float32),
    "LessEqual": lambda x, keep: x / keep * tf.cast(rate(keep) <= uniform(x), tf.float32),
    "mask only": lambda x, keep: x * tf.floor(keep + uniform(x)),
}
ALL = pytest.mark.parametrize("form", FORMS)


def program_with(form, keep=lambda: tf.constant(KEEP)):
    def build():
        x = x_of()
        h = tf.matmul(x, tf1.get_variable("w", [4, 4]))
        tf.nn.relu(FORMS[form](h, keep()) + 1.0, name="tap")

    return Program(build)


def without_dropout():
    def build():
        h = tf.matmul(x_of(), tf1.get_variable("w", [4, 4]))
        tf.nn.relu(h + 1.0, name="tap")

    return Program(build)


def random_ops(graph_def):
    return [n.name for n in graph_def.node if "Random" in n.op]


@ALL
def test_dropout_that_is_always_on_is_bypassed(form):
    program = program_with(form)
    network = program.network()
    assert random_ops(network.graph_def) == []
    x = images(3, 4)
    (w,) = program.values(network).values()
    assert_close(program.layer(network)(x), np.maximum(x @ w + 1.0, 0.0))


@ALL
def test_keep_dropout_keeps_dropout(form):
    network = program_with(form).network(keep_dropout=True)
    assert random_ops(network.graph_def)


@ALL
def test_training_uses_dropout_rate_of_program(form):
    def build():
        h = tf.identity(x_of(200))
        tf.identity(FORMS[form](h, tf.constant(KEEP)), name="tap")

    x = np.ones([100, 200], np.float32)
    layer = Program(build).layer()
    np.testing.assert_array_equal(layer(x), x)
    dropped = layer(x, training=True).numpy()
    assert np.mean(dropped == 0.0) == pytest.approx(1 - KEEP, abs=0.1)
    kept = 1.0 if form == "mask only" else 1 / KEEP
    np.testing.assert_allclose(dropped[dropped != 0.0], kept, rtol=1e-6)


@ALL
def test_amount_and_control_are_detected(form):
    def keep():
        return tf1.placeholder(tf.float32, name="p")

    (mode,) = program_with(form, keep).network().modes
    assert (mode.tensor, mode.kind) == ("p:0", "keep_prob")
    assert (mode.inference, mode.training) == (1.0, 0.5)


@ALL
def test_fed_keep_prob_equals_session(form):
    """With a keep probability of 1, dropout is the identity in both."""
    program = program_with(form, lambda: tf1.placeholder(tf.float32, [], name="p"))
    network = program.network(feeds={"p": 1.0}, keep_dropout=True)
    x = images(3, 4)
    assert_close(program.layer(network)(x), program.run(x, {"p:0": 1.0}))


def test_consecutive_dropouts_are_bypassed():
    def build():
        h = tf1.nn.dropout(tf.identity(x_of()), rate=0.5)
        h = tf.nn.relu(FORMS["1.0, Div"](h, tf.constant(0.5)))
        tf.identity(h, name="tap")

    x = images(3, 4)
    assert_close(Program(build).layer()(x), np.maximum(x, 0.0))


def test_tap_may_be_dropout_itself():
    program = Program(lambda: tf1.nn.dropout(tf.tanh(x_of()), rate=0.5, name="dropout"))
    *_, tap = (n.name for n in program.graph_def.node if n.name.startswith("dropout/"))
    layer = program.layer(tap=tap)
    x = images(3, 4)
    assert_close(layer(x), np.tanh(x))
    assert (layer(x, training=True).numpy() == 0.0).any()


def test_scale_of_norm_is_not_mistaken_for_dropout():
    def build():
        x = x_of()
        gamma = tf1.get_variable("gamma", initializer=[2.0, 3.0, 4.0, 5.0])
        tf.multiply(x * gamma, tf.floor(KEEP + uniform(x)), name="tap")

    program = Program(build)
    x = images(3, 4)
    layer = program.layer()
    assert layer.variable_names == ["gamma"]
    assert_close(layer(x), x * [2.0, 3.0, 4.0, 5.0])


def test_per_channel_scale_is_not_mistaken_for_dropout():
    def build():
        x = x_of()
        scaled = x * tf.constant([1.0, 2.0, 3.0, 4.0])
        tf.multiply(scaled, tf.floor(KEEP + uniform(x)), name="tap")

    x = images(3, 4)
    assert_close(Program(build).layer()(x), x * [1.0, 2.0, 3.0, 4.0])


def test_scalar_weight_is_not_mistaken_for_dropout():
    def build():
        x = x_of()
        scale = tf1.get_variable("scale", initializer=3.0)
        tf.multiply(x * scale, tf.floor(KEEP + uniform(x)), name="tap")

    x = images(3, 4)
    assert_close(Program(build).layer()(x), 3.0 * x)


@pytest.mark.parametrize(
    "noisy",
    [
        lambda x: x + tf1.random_normal(tf.shape(x)),
        lambda x: x + uniform(x),
        lambda x: x * uniform(x),
        lambda x: x * (1.0 + tf1.random_normal(tf.shape(x), stddev=0.5)),
        lambda x: tf.where(uniform(x) < 0.5, x, tf.reverse(x, [1])),
        lambda x: x + tf.floor(KEEP + uniform(x)),
    ],
    ids=["gaussian", "additive", "uniform", "multiplicative", "flip", "added mask"],
)
def test_other_noise_is_not_dropout(noisy):
    def build():
        tf.identity(noisy(x_of()), name="tap")

    nodes = Program(build).graph_def.node
    assert find_dropout(nodes, downstream(nodes, ["x"]) | {"x"}) == []


def test_comparisons_without_random_numbers_are_not_dropout():
    def build():
        x = x_of()
        tf.multiply(x / 2.0, tf.cast(x > 0.5, tf.float32), name="tap")

    program = Program(build)
    assert_equals_stock(program, images(3, 4))


def test_gradients_pass_through_bypassed_dropout():
    plain = without_dropout()
    assert_equals_stock(plain, images(3, 4), network=program_with("2.12").network())
