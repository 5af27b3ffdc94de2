"""Checks of input and output shapes; values equal those of a plain session."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, images

from transfer.graph.network_function import output_shape

tf1 = tf.compat.v1
FIXED = (None, 16, 16, 3)
OPEN = (None, None, None, 3)


def flattening(shape, target=(-1, 8 * 8 * 4)):
    """A convolution, pooling, and a fully connected layer after a reshape."""

    def build():
        x = tf1.placeholder(tf.float32, shape, name="x")
        net = tf.nn.relu(tf.nn.conv2d(x, tf1.get_variable("kernel", [3, 3, 3, 4]), 1, "SAME"))
        net = tf.reshape(tf.nn.max_pool2d(net, 2, 2, "SAME"), target)
        tf.matmul(net, tf1.get_variable("weights", [8 * 8 * 4, 5]), name="tap")

    return Program(build)


def averaging():
    """Fully convolutional: takes any size."""

    def build():
        x = tf1.placeholder(tf.float32, OPEN, name="x")
        net = tf.nn.conv2d(x, tf1.get_variable("kernel", [3, 3, 3, 4]), 1, "SAME")
        tf.reduce_mean(tf.nn.relu(net), [1, 2], name="tap")

    return Program(build)


def from_x(make, shape=FIXED):
    return Program(lambda: tf.identity(make(tf1.placeholder(tf.float32, shape, name="x")), "tap"))


# Twice the size gives four rows per image; half the size gives one row for four images.
OTHER_SIZES = [(2, 32, 32, 3), (4, 8, 8, 3), (1, 32, 32, 3)]


@pytest.mark.parametrize("shape", OTHER_SIZES)
@pytest.mark.parametrize("stated", [FIXED, OPEN, None], ids=["fixed", "open", "no shape"])
def test_images_of_wrong_size_are_rejected(stated, shape):
    layer = flattening(stated).layer()
    message = "takes .None, 16, 16, 3.: resize" if stated == FIXED else r"\d+ rows for \d+ examples"
    with pytest.raises(ValueError, match=message):
        layer(images(*shape))
    if shape != (4, 8, 8, 3) or stated == FIXED:  # else four images are merged to one row
        with pytest.raises(ValueError, match=message):
            layer(keras.Input(shape[1:]))
    x = images(*FIXED[1:])[None]
    assert layer(x).shape == (1, 5)  # works after rejected calls


@pytest.mark.parametrize("shape", OTHER_SIZES)
@pytest.mark.parametrize("stated", [FIXED, OPEN], ids=["fixed", "open"])
def test_sizes_unknown_in_tracing_are_checked_at_run_time(stated, shape):
    program = flattening(stated)
    layer = program.layer()
    run = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec(OPEN)])
    x = images(3, 16, 16, 3)
    assert_close(run(x), program.run(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match="resize"):
        run(images(*shape))


def test_sizes_are_checked_after_calls_with_different_ones():
    """Retracing relaxes the sizes of previous calls."""
    program = flattening(OPEN)
    layer = program.layer()
    for shape in [(2, 16, 16, 3), (3, 16, 16, 3), (2, 8, 32, 3), (2, 32, 8, 3)]:
        assert layer(images(*shape)).shape == (shape[0], 5)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="resize the images"):
        layer(images(2, 32, 32, 3))
    x = images(4, 16, 16, 3)
    assert_close(layer(x), program.run(x))


def test_fully_convolutional_networks_take_any_size():
    program = averaging()
    layer = program.layer()
    for shape in [(2, 16, 16, 3), (3, 24, 40, 3), (1, 7, 5, 3), (5, 64, 64, 3)]:
        x = images(*shape)
        assert_close(layer(x), program.run(x))
    assert layer(keras.Input((None, None, 3))).shape == (None, 4)


@pytest.mark.parametrize("program", [flattening(FIXED), flattening(OPEN), flattening(None)])
def test_image_without_batch_axis_is_rejected_after_a_batch(program):
    """A relaxed signature of an unknown rank aborts the process in oneDNN."""
    layer = program.layer()
    x = images(5, 16, 16, 3)
    assert layer(x).shape == (5, 5)
    with pytest.raises(ValueError, match=r"\(16, 16, 3\)|rank 3"):
        layer(x[0])
    assert_close(layer(x[:3]), program.run(x[:3]))


@pytest.mark.parametrize("stated", [FIXED, OPEN], ids=["fixed", "open"])
def test_rank_unknown_in_tracing_is_checked_at_run_time(stated):
    program = flattening(stated)
    layer = program.layer()
    run = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec(None)])
    x = images(3, 16, 16, 3)
    assert_close(run(x), program.run(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[16,16,3\] is not compatible"):
        run(x[0])


def test_unknown_rank_of_input_and_graph_is_rejected():
    layer = flattening(None).layer()
    run = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec(None)])
    with pytest.raises(ValueError, match="give it a static shape"):
        run(images(3, 16, 16, 3))


@pytest.mark.parametrize("channels", [1, 4])
def test_wrong_number_of_channels_is_rejected(channels):
    with pytest.raises(ValueError, match=rf"{channels}\); the network takes \(None, 16, 16, 3\)"):
        flattening(FIXED).layer()(images(2, 16, 16, channels))


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda x: x[:1], 1),
        (lambda x: x[:2], 2),
        (lambda x: x[: tf.shape(x)[0] // 2], 2),
        (lambda x: tf.split(x, 2)[1], 2),
        (lambda x: tf.concat([x, x[:, ::-1]], 0), 8),
        (lambda x: tf.reduce_mean(x, 0), 16),
        (lambda x: tf.reshape(x, [-1, 8 * 16 * 3]), 8),
    ],
    ids=["first", "two", "half", "tower", "views", "mean", "halves"],
)
def test_output_without_one_row_per_example_is_rejected(make, rows):
    layer = from_x(make).layer()
    with pytest.raises(ValueError, match=f"gives {rows} rows for 4 examples"):
        layer(images(4, 16, 16, 3))
    run = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec(FIXED)])
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="a row for each"):
        run(images(4, 16, 16, 3))


def test_scalar_output_is_allowed():
    program = from_x(tf.reduce_mean)
    layer = program.layer()
    for number in (2, 5, 3):
        x = images(number, 16, 16, 3)
        assert_close(layer(x), program.run(x))


def test_rows_of_fixed_batch_are_checked():
    """Batches of four examples give two rows."""
    program = from_x(lambda x: tf.reshape(x + tf.ones([4, 16, 16, 3]), [2, -1]), (4, 16, 16, 3))
    with pytest.raises(ValueError, match="2 rows for 4 examples"):
        program.layer()(images(4, 16, 16, 3))


def test_images_are_flattened_for_vector_input():
    program = from_x(lambda x: x * 2.0, (None, 48))
    layer = program.layer()
    x = images(3, 4, 4, 3)
    assert_close(layer(x), program.run(x.reshape(3, 48)))
    assert_close(layer(x.reshape(3, 48)), program.run(x.reshape(3, 48)))
    with pytest.raises(ValueError, match=r"\(3, 8, 8, 3\); the network takes \(None, 48\)"):
        layer(images(3, 8, 8, 3))
    run = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec(OPEN)])
    assert_close(run(x), program.run(x.reshape(3, 48)))
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(images(1, 8, 8, 3))


def test_width_computed_from_batch_size_is_known():
    def flatten(x):
        return tf.reshape(x, tf.stack([tf.shape(x)[0], -1]))

    program = from_x(flatten)
    layer = program.layer()
    assert output_shape(layer.network, FIXED[1:]).as_list() == [None, 768]
    assert layer(keras.Input(FIXED[1:])).shape == (None, 768)
    x = images(3, 16, 16, 3)
    assert_close(layer(x), program.run(x))


@pytest.mark.parametrize(
    "convert",
    [tf.constant, tf.Variable, keras.Variable, lambda x: x.astype("float64"), lambda x: x > 0],
    ids=["tensor", "variable", "keras variable", "float64", "bool"],
)
def test_inputs_of_any_type_are_converted(convert):
    program = flattening(FIXED)
    x = images(2, 16, 16, 3)
    expected = program.run((x > 0).astype("float32") if convert(x).dtype == bool else x)
    assert_close(program.layer()(convert(x)), expected)


def test_non_numeric_input_is_rejected():
    with pytest.raises(ValueError, match="type string; expected numbers"):
        flattening(FIXED).layer()(tf.constant([["a"]]))


def test_parts_of_split_network_check_their_input():
    layer = flattening(OPEN).layer()
    x = images(2, 16, 16, 3)
    prefix, suffix = layer.split("Relu")
    np.testing.assert_array_equal(suffix(prefix(x)), layer(x))
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\); the network takes"):
        suffix(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"a row for each.*\[2\] \[8\]"):
        suffix(prefix(images(2, 32, 32, 3)))
