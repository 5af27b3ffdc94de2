"""TF1 programs with unusual graphs, as found in the wild: a ``.meta`` and a checkpoint of each.

The name of a program says what is unusual. All are small, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from stock import control_flow_v1

tf1 = tf.compat.v1


def save(build: Callable[[], Any], prefix: Path | str) -> str:
    """Run a program up to its ``saver.save``; returns the checkpoint prefix."""
    Path(f"{prefix}.meta").parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), control_flow_v1(), tf1.Session() as session:
        tf1.set_random_seed(0)
        build()
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(prefix))
    return str(prefix)


def variable(name: str, shape: list[int]) -> tf.Tensor:
    initializer = tf1.random_normal_initializer(stddev=(2 / np.prod(shape[:-1])) ** 0.5)
    return tf1.get_variable(name, shape, initializer=initializer, use_resource=False)


def conv(
    x: tf.Tensor, name: str, channels: int, padding: str = "SAME", order: str = "NHWC"
) -> tf.Tensor:
    with tf1.variable_scope(name):
        depth = int(x.shape[order.index("C")])
        net = tf1.nn.conv2d(
            x,
            variable("weights", [3, 3, depth, channels]),
            [1, 1, 1, 1],
            padding,
            data_format=order,
        )
        net = tf1.nn.bias_add(net, variable("biases", [channels]), data_format=order)
        return tf.nn.relu(net, name="relu")


def pool(x: tf.Tensor, name: str, order: str = "NHWC") -> tf.Tensor:
    window = [1, 2, 2, 1] if order == "NHWC" else [1, 1, 2, 2]
    return tf1.nn.max_pool(x, window, window, "VALID", data_format=order, name=name)


def dense(x: tf.Tensor, name: str, width: int, activation: Any = tf.nn.relu) -> tf.Tensor:
    with tf1.variable_scope(name):
        net = tf.matmul(x, variable("weights", [int(x.shape[-1]), width]))
        net = tf.nn.bias_add(net, variable("biases", [width]))
        return activation(net, name="relu") if activation else net


def flatten(x: tf.Tensor, length: int) -> tf.Tensor:
    return tf.reshape(x, [-1, length], name="flat")


def head(x: tf.Tensor) -> None:
    tf.nn.softmax(dense(x, "fc8", 10, None), name="prob")


def body(x: tf.Tensor, length: int = 4 * 4 * 8) -> tf.Tensor:
    """A network for images of 16 pixels; returns the features, fc7."""
    net = pool(conv(x, "conv1", 4), "pool1")
    net = pool(conv(net, "conv2", 8), "pool2")
    return dense(flatten(net, length), "fc7", 12)


def images(*shape: int | None, dtype: Any = tf.float32) -> tf.Tensor:
    return tf1.placeholder(dtype, [None, *shape], name="images")


def a_feed_beside_the_images() -> None:
    strength = tf1.placeholder(tf.float32, [], name="strength")
    head(body(images(16, 16, 3) * strength))


def a_switch_without_use_for_training() -> None:
    x, flip = images(16, 16, 3), tf1.placeholder(tf.bool, [], name="flip")
    head(body(tf1.cond(flip, lambda: x[:, :, ::-1], lambda: tf.identity(x))))


def jpeg_files() -> None:
    file = tf1.placeholder(tf.string, [], name="contents")
    image = tf.cast(tf.image.decode_jpeg(file, channels=3), tf.float32)
    image = tf1.image.resize_bilinear(image[None], [16, 16], name="ResizeBilinear")
    head(body((image - 128.0) / 128.0))


def many_jpeg_files() -> None:
    files = tf1.placeholder(tf.string, [None], name="contents")

    def read(file: tf.Tensor) -> tf.Tensor:
        image = tf.image.decode_jpeg(file, channels=3)
        image = tf1.image.resize_images(image, [16, 16])
        image.set_shape([16, 16, 3])
        return image

    head(body(tf.map_fn(read, files, tf.float32) / 255.0))


def an_image_size_that_the_flatten_states() -> None:
    head(body(images(None, None, 3), 10 * 10 * 8))


def an_image_size_that_the_product_states() -> None:
    net = pool(conv(images(None, None, 3), "conv1", 4, "VALID"), "pool1")
    width = tf.reduce_prod(tf.shape(net)[1:])
    net = tf.reshape(net, tf.stack([tf.shape(net)[0], width]))
    net = tf.matmul(net, variable("fc7/weights", [5 * 5 * 4, 12]))
    head(tf.ensure_shape(tf.nn.relu(net), [None, 12]))


def windows_larger_than_usual_images() -> None:
    net = conv(images(None, None, 3), "conv1", 2, "VALID")
    net = tf1.nn.avg_pool(net, [1, 254, 254, 1], [1, 254, 254, 1], "VALID")
    head(dense(flatten(net, 2), "fc7", 12))


def images_that_are_not_square() -> None:
    head(body(images(8, 24, 1), 2 * 6 * 8))


def a_size_that_is_not_square_and_not_stated() -> None:
    head(body(images(None, None, 1), 2 * 7 * 8))


def channels_first() -> None:
    net = images(3, 16, 16)
    for number, channels in enumerate((4, 8), 1):
        net = pool(conv(net, f"conv{number}", channels, order="NCHW"), f"pool{number}", "NCHW")
    head(dense(flatten(net, 4 * 4 * 8), "fc7", 12))


def channels_first_inside() -> None:
    net = tf.transpose(images(16, 16, 3), [0, 3, 1, 2])
    net = conv(net, "conv1", 4, order="NCHW")
    net = tf.concat([net, conv(net, "conv2", 4, order="NCHW")], 1)
    net = tf.pad(net, [[0, 0], [0, 0], [1, 0], [0, 2]])
    scale, offset = variable("bn/gamma", [8]), variable("bn/beta", [8])
    mean, variance = variable("bn/moving_mean", [8]), tf.exp(variable("bn/log_variance", [8]))
    net, _, _ = tf1.nn.fused_batch_norm(
        net, scale, offset, mean, variance, is_training=False, data_format="NCHW"
    )
    net = net * tf.reshape(variable("scale", [8]), [1, 8, 1, 1]) + variable("shift", [8, 1, 1])
    net = tf.reduce_mean(net, [2, 3], keepdims=True)
    head(dense(flatten(net, 8), "fc7", 12))


def towers_of_a_split() -> None:
    outputs = []
    for number, part in enumerate(tf.split(images(16, 16, 3), 2)):
        with tf1.name_scope(f"tower_{number}"), tf1.variable_scope("net", reuse=number > 0):
            outputs.append(dense(body(part), "fc8", 10, None))
    tf.nn.softmax(tf.concat(outputs, 0), name="prob")


def towers_of_slices() -> None:
    x, outputs = images(16, 16, 3), []
    part = tf.shape(x)[0] // 3
    for number in range(3):
        with tf1.name_scope(f"tower_{number}"), tf1.variable_scope("net", reuse=number > 0):
            mine = x[number * part : (number + 1) * part]
            outputs.append(dense(body(mine), "fc8", 10, None))
    tf.nn.softmax(tf.concat(outputs, 0), name="prob")


def a_batch_in_a_transposed_convolution() -> None:
    net = pool(conv(images(16, 16, 3), "conv1", 4), "pool1")
    net = tf1.nn.conv2d_transpose(
        net, variable("up/weights", [3, 3, 8, 4]), [20, 16, 16, 8], [1, 2, 2, 1], "SAME", name="up"
    )
    head(dense(flatten(net, 16 * 16 * 8), "fc7", 12))


def dropout_that_is_always_on() -> None:
    head(tf1.nn.dropout(body(images(16, 16, 3)), rate=0.4))


def whole_numbers() -> None:
    head(body(tf.cast(images(16, 16, 3, dtype=tf.uint8), tf.float32) / 255.0))


def two_inputs() -> None:
    aside = tf1.placeholder(tf.float32, [None, 5], name="metadata")
    net = body(images(16, 16, 3))
    head(dense(tf.concat([net, aside], 1), "fc9", 12))


def a_switch_for_batch_norm() -> None:
    is_training = tf1.placeholder(tf.bool, name="phase")
    net = conv(images(16, 16, 3), "conv1", 4)
    mean, variance = variable("bn/moving_mean", [4]), tf.square(variable("bn/moving_variance", [4]))
    used = tf1.cond(
        is_training,
        lambda: tuple(tf1.nn.moments(net, [0, 1, 2])),
        lambda: (tf.identity(mean), tf.identity(variance)),
    )
    net = tf1.nn.batch_normalization(net, *used, None, None, 1e-3)
    head(dense(flatten(pool(net, "pool1"), 8 * 8 * 4), "fc7", 12))


def a_queue() -> None:
    queue = tf1.FIFOQueue(10, [tf.float32, tf.int32], [[16, 16, 3], []])
    x, _ = queue.dequeue_many(4)
    head(body(x))


def a_batch_that_is_a_number() -> None:
    x, size = images(16, 16, 3), tf1.placeholder(tf.int32, [], name="batch_size")
    net = pool(conv(x, "conv1", 4), "pool1")
    head(dense(tf.ensure_shape(tf.reshape(net, [size, 256]), [None, 256]), "fc7", 12))


def gradients_that_stop() -> None:
    net = pool(conv(images(16, 16, 3), "conv1", 4), "pool1")
    net = tf.stop_gradient(net, name="frozen")
    head(dense(flatten(conv(net, "conv2", 8), 8 * 8 * 8), "fc7", 12))


def vectors() -> None:
    x = tf1.placeholder(tf.float32, [None, 256], name="images")
    head(body(tf.reshape(x, [-1, 16, 16, 1])))


def an_operation_that_is_not_arithmetic() -> None:
    net = pool(conv(images(16, 16, 3), "conv1", 4), "pool1")
    net = tf.ensure_shape(tf.numpy_function(lambda v: v, [net], tf.float32), [None, 8, 8, 4])
    head(dense(flatten(net, 256), "fc7", 12))


ALL = {
    name: build
    for name, build in list(globals().items())
    if callable(build)
    and getattr(build, "__module__", None) == __name__
    and name
    not in ("save", "variable", "conv", "pool", "dense", "flatten", "head", "body", "images")
}
