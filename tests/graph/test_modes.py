"""Detection of placeholders that switch between training and inference."""

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, assert_equals_stock, images

from transfer.graph import ancestors, extract, find_modes

tf1 = tf.compat.v1


def x_of(width=4):
    return tf1.placeholder(tf.float32, [None, width], name="x")


def old_dropout(x, keep_prob):
    return x / keep_prob * tf.floor(keep_prob + tf1.random_uniform(tf.shape(x)))


def program_of(build_tap):
    def build():
        tf.identity(build_tap(tf.tanh(x_of())), name="tap")

    return Program(build)


def modes_of(program):
    return {
        mode.tensor: (mode.kind, mode.inference, mode.training) for mode in program.network().modes
    }


def share_of_zeros(layer, shape=(100, 200)):
    return np.mean(layer(np.ones(shape, np.float32), training=True).numpy() == 0.0)


def test_keep_prob_without_name_and_shape_is_detected():
    program = program_of(lambda h: old_dropout(h, tf1.placeholder(tf.float32)))
    assert modes_of(program) == {"Placeholder:0": ("keep_prob", 1.0, 0.5)}
    assert_equals_stock(program, images(3, 4), {"Placeholder:0": 1.0})


def test_placeholder_of_very_old_graph_is_detected():
    program = program_of(lambda h: old_dropout(h, tf1.placeholder(tf.float32)))
    graph_def = program.graph_def
    node = next(n for n in graph_def.node if n.name == "Placeholder")
    node.op = "PlaceholderV2"
    (mode,) = find_modes(ancestors(graph_def.node, "tap"), "x:0")
    assert (mode.tensor, mode.kind) == ("Placeholder:0", "keep_prob")


def test_rate_is_detected():
    program = program_of(
        lambda h: tf1.nn.dropout(h, rate=tf1.placeholder(tf.float32, [], name="drop"))
    )
    assert modes_of(program) == {"drop:0": ("rate", 0.0, 0.5)}
    assert_equals_stock(program, images(3, 4), {"drop:0": 0.0})


def test_keep_prob_passed_as_rate_is_detected():
    program = program_of(
        lambda h: tf1.nn.dropout(h, rate=1 - tf1.placeholder(tf.float32, name="keep"))
    )
    assert modes_of(program) == {"keep:0": ("keep_prob", 1.0, 0.5)}


def test_rate_passed_as_keep_prob_is_detected():
    program = program_of(lambda h: old_dropout(h, 1 - tf1.placeholder(tf.float32, name="drop")))
    assert modes_of(program) == {"drop:0": ("rate", 0.0, 0.5)}


def test_keep_prob_of_other_dtype_is_detected():
    program = program_of(
        lambda h: old_dropout(h, tf.cast(tf1.placeholder(tf.float64, name="p"), tf.float32))
    )
    assert modes_of(program) == {"p:0": ("keep_prob", 1.0, 0.5)}
    assert_equals_stock(program, images(3, 4), {"p:0": 1.0})


def program_of_width(width, default):
    def build():
        p = tf1.placeholder_with_default(default, [], name="p")
        tf.identity(old_dropout(tf.tanh(x_of(width)), p), name="tap")

    return Program(build)


@pytest.mark.parametrize(
    ("default", "training"), [(1.0, 0.5), (0.75, 0.75), (0.0, 0.5)], ids=["on", "drops", "off"]
)
def test_training_value_is_default_of_placeholder(default, training):
    program = program_of_width(200, default)
    assert modes_of(program) == {"p:0": ("keep_prob", 1.0, training)}
    assert share_of_zeros(program.layer()) == pytest.approx(1 - training, abs=0.02)


def test_several_keep_probs_are_detected():
    def tap(h):
        first, second = tf1.placeholder(tf.float32), tf1.placeholder(tf.float32)
        return old_dropout(tf.exp(old_dropout(h, first)), second)

    program = program_of(tap)
    assert modes_of(program) == {
        "Placeholder:0": ("keep_prob", 1.0, 0.5),
        "Placeholder_1:0": ("keep_prob", 1.0, 0.5),
    }
    feeds = {"Placeholder:0": 1.0, "Placeholder_1:0": 1.0}
    assert_equals_stock(program, images(3, 4), feeds)


def test_shared_keep_prob_is_detected_once():
    def tap(h):
        p = tf1.placeholder(tf.float32, name="p")
        return old_dropout(tf.exp(old_dropout(h, p)), p)

    assert list(modes_of(program_of(tap))) == ["p:0"]


def cond_dropout(h, is_training):
    return tf1.cond(is_training, lambda: old_dropout(h, 0.25), lambda: h)


def test_is_training_switch_is_detected():
    program = program_of(
        lambda h: cond_dropout(h, tf1.placeholder(tf.bool, [], name="is_training"))
    )
    assert modes_of(program) == {"is_training:0": ("is_training", False, True)}
    assert_equals_stock(program, images(3, 4), {"is_training:0": False})


def test_switch_without_name_and_shape_is_detected():
    program = program_of(lambda h: cond_dropout(h, tf1.placeholder(tf.bool)))
    assert modes_of(program) == {"Placeholder:0": ("is_training", False, True)}


@pytest.mark.parametrize("default", [True, False])
def test_switch_with_default_is_detected(default):
    program = program_of(
        lambda h: cond_dropout(h, tf1.placeholder_with_default(default, [], name="is_training"))
    )
    assert modes_of(program) == {"is_training:0": ("is_training", False, True)}
    assert_equals_stock(program, images(3, 4), {"is_training:0": False})


def test_switch_of_tensorflow_2_conditionals_is_detected():
    def build():
        h = tf.tanh(x_of())
        tf.identity(cond_dropout(h, tf1.placeholder(tf.bool, [], name="p")), name="tap")

    program = Program(build, conds="v2")
    assert modes_of(program) == {"p:0": ("is_training", False, True)}
    assert_equals_stock(program, images(3, 4), {"p:0": False})


def test_inverted_switch_is_detected():
    def tap(h):
        is_inference = tf1.placeholder(tf.bool, [], name="is_inference")
        return tf1.cond(is_inference, lambda: h, lambda: old_dropout(h, 0.25))

    program = program_of(tap)
    assert modes_of(program) == {"is_inference:0": ("is_training", True, False)}
    assert_equals_stock(program, images(3, 4), {"is_inference:0": True})


def test_negated_switch_is_detected():
    def tap(h):
        is_inference = tf1.placeholder(tf.bool, [], name="is_inference")
        return cond_dropout(h, tf.logical_not(is_inference))

    program = program_of(tap)
    assert modes_of(program) == {"is_inference:0": ("is_training", True, False)}
    assert_equals_stock(program, images(3, 4), {"is_inference:0": True})


def test_switch_stored_in_variable_is_detected():
    """As in TFLearn."""

    def tap(h):
        is_training = tf1.get_variable(
            "is_training", initializer=False, trainable=False, use_resource=False
        )
        return cond_dropout(h, is_training)

    program = program_of(tap)
    assert modes_of(program) == {"is_training:0": ("is_training", False, True)}
    assert program.network().variables == ()
    assert_equals_stock(program, images(3, 4))


def test_keep_prob_selected_by_switch_is_detected():
    def tap(h):
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        keep = tf1.cond(is_training, lambda: tf.constant(0.25), lambda: tf.constant(1.0))
        return old_dropout(h, keep)

    program = program_of(tap)
    assert modes_of(program) == {"is_training:0": ("is_training", False, True)}
    assert_equals_stock(program, images(3, 4), {"is_training:0": False})


def test_switch_and_keep_prob_are_both_detected():
    def tap(h):
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        p = tf1.placeholder(tf.float32, name="p")
        return tf1.cond(is_training, lambda: old_dropout(h, p), lambda: h)

    program = program_of(tap)
    assert modes_of(program) == {
        "is_training:0": ("is_training", False, True),
        "p:0": ("keep_prob", 1.0, 0.5),
    }


def test_feeds_override_detected_modes():
    program = program_of(lambda h: old_dropout(h, tf1.placeholder(tf.float32, name="p")))
    network = program.network(feeds={"p": 0.25})
    assert network.modes == ()
    layer = program.layer(network)
    x = np.ones([100, 4], np.float32)
    assert np.mean(layer(x, training=True).numpy() == 0.0) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("value", [True, False])
def test_fed_switch_is_the_same_in_training(value):
    def tap(h):
        is_training = tf1.placeholder(tf.bool, [], name="is_training")
        return tf1.cond(is_training, lambda: 2.0 * h, lambda: 3.0 * h)

    program = program_of(tap)
    layer = program.layer(feeds={"is_training": value})
    x = images(3, 4)
    expected = program.run(x, {"is_training:0": value})
    assert_close(layer(x), expected)
    assert_close(layer(x, training=True), expected)


def test_inference_is_deterministic_and_training_uses_dropout():
    def build():
        p = tf1.placeholder(tf.float32, name="p")
        tf.identity(old_dropout(tf.tanh(x_of(200)), p), name="tap")

    layer = Program(build).layer()
    x = np.ones([100, 200], np.float32)
    np.testing.assert_array_equal(layer(x), np.broadcast_to(np.tanh(x[0, 0]), x.shape))
    dropped = layer(x, training=True).numpy()
    assert np.mean(dropped == 0.0) == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(dropped[dropped != 0.0], 2 * np.tanh(x[0, 0]), rtol=1e-6)


def test_training_gradients_use_the_dropout_mask():
    def build():
        p = tf1.placeholder(tf.float32, name="p")
        tf.identity(old_dropout(tf.exp(x_of(50)), p), name="tap")

    layer = Program(build).layer()
    x = tf.zeros([10, 50])
    with tf.GradientTape() as tape:
        tape.watch(x)
        dropped = layer(x, training=True)
    np.testing.assert_array_equal(tape.gradient(dropped, x), dropped)


def norm_by_hand(h, is_training):
    shape = [h.shape[-1]]
    statistics = [
        tf1.get_variable("moving_mean", shape, trainable=False),
        tf1.get_variable("moving_variance", initializer=[1.0, 2.0, 3.0, 4.0], trainable=False),
    ]
    mean, variance = tf1.cond(
        is_training,
        lambda: list(tf.nn.moments(h, [0])),
        lambda: [tf.identity(statistic) for statistic in statistics],
    )
    return tf.nn.batch_normalization(h, mean, variance, None, None, 1e-3)


def norm_fused(h, is_training):
    h = h[:, None, None, :]
    ones = tf.ones([4])
    mean = tf1.get_variable("moving_mean", [4], trainable=False)
    variance = tf1.get_variable("moving_variance", initializer=ones, trainable=False)
    norm = tf1.nn.fused_batch_norm
    return tf1.cond(
        is_training,
        lambda: norm(h, ones, 0.0 * ones, is_training=True)[0],
        lambda: norm(h, ones, 0.0 * ones, mean, variance, is_training=False)[0],
    )


@pytest.mark.parametrize("inverted", [False, True], ids=["is_training", "is_inference"])
@pytest.mark.parametrize("norm", [norm_by_hand, norm_fused])
def test_batch_norm_uses_moving_averages_in_training(norm, inverted):
    def tap(h):
        switch = tf1.placeholder(tf.bool, [], name="switch")
        return norm(h, tf.logical_not(switch) if inverted else switch)

    program = program_of(tap)
    assert modes_of(program) == {"switch:0": ("is_training", inverted, not inverted)}
    layer = program.layer()
    x = images(5, 4)
    expected = program.run(x, {"switch:0": inverted})
    assert_close(layer(x), expected)
    assert_close(layer(x, training=True), expected)
    assert {v.name for v in layer.trainable_variables} == set()


def test_batch_norm_without_its_attribute_uses_batch_statistics():
    """SavedModels leave out attributes with their default, here true."""

    def tap(h):
        return norm_fused(h, tf.logical_not(tf1.placeholder(tf.bool, [], name="is_test")))

    program = program_of(tap)
    stripped = type(program.graph_def)()
    stripped.CopyFrom(program.graph_def)
    for node in stripped.node:
        if node.op.startswith("FusedBatchNorm") and node.attr["is_training"].b:
            del node.attr["is_training"]
    network = extract(stripped, "tap", "x", tf.float32, input_shape=(None, 4))
    (mode,) = network.modes
    assert (mode.tensor, mode.inference, mode.training) == ("is_test:0", True, False)


def test_dropout_directly_after_batch_norm_is_active_in_training():
    def build():
        switch = tf1.placeholder(tf.bool, [], name="switch")
        ones = tf.ones([4])
        h = x_of()[:, None, None, :]
        h = tf1.nn.fused_batch_norm(h, ones, ones, 0 * ones, ones, is_training=False)[0]
        tf.identity(cond_dropout(h, switch), name="tap")

    layer = Program(build).layer()
    x = images(100, 4)
    assert np.mean(layer(x, training=True).numpy() == 0.0) == pytest.approx(0.75, abs=0.1)
    assert not (layer(x).numpy() == 0.0).any()


def test_dropout_beside_batch_norm_is_active_in_training():
    def build():
        switch = tf1.placeholder(tf.bool, [], name="switch")
        h = norm_by_hand(tf.tanh(x_of()), switch)
        tf.identity(cond_dropout(h + 10.0, switch), name="tap")

    layer = Program(build).layer()
    x = images(100, 4)
    assert np.mean(layer(x, training=True).numpy() == 0.0) == pytest.approx(0.75, abs=0.1)
    assert not (layer(x).numpy() == 0.0).any()


def test_other_placeholders_are_not_mistaken_for_modes():
    def build():
        h = tf.tanh(x_of()) * tf1.placeholder(tf.float32, name="scale")
        tf.identity(h / tf1.placeholder(tf.float32, name="temperature"), name="tap")

    with pytest.raises(ValueError, match="depends on temperature:0, scale:0; give each a value"):
        Program(build).network()


def test_input_is_not_mistaken_for_switch():
    def build():
        x = tf1.placeholder(tf.bool, name="x")
        tf.cast(x, tf.float32, name="tap")

    assert Program(build).network().modes == ()


def test_why_names_the_dropout_or_the_branch():
    def tap(h):
        switch = tf1.placeholder(tf.bool, [], name="switch")
        return tf.multiply(cond_dropout(h, switch), 1.0)

    (mode,) = program_of(tap).network().modes
    assert mode.why.startswith("cond/")
