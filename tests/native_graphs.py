"""TF1 graphs that each use an operation that ``to_keras`` converts: placeholder ``x``, tensor
``tap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1


def x(*shape: int, dtype: Any = tf.float32) -> tf.Tensor:
    return tf1.placeholder(dtype, [None, *shape], name="x")


def images(channels: int = 3, size: int = 9) -> tf.Tensor:
    return x(size, size + 2, channels)


def weights(name: str, *shape: int, low: float = -1.0) -> tf.Tensor:
    values = np.random.default_rng(len(name)).uniform(low, 1, shape).astype(np.float32)
    return tf1.get_variable(name, initializer=values, use_resource=False)


def tap(values: tf.Tensor) -> None:
    tf.identity(values, name="tap")


def conv(net: tf.Tensor, name: str, width: int, size: int = 3, **options: Any) -> tf.Tensor:
    kernel = weights(f"{name}/weights", size, size, int(net.shape[-1]), width)
    options = {"strides": 1, "padding": "SAME"} | options
    return tf1.nn.conv2d(net, kernel, name=f"{name}/Conv2D", **options)


def of_images(function: Callable[[tf.Tensor], tf.Tensor], **shape: int) -> Callable[[], None]:
    return lambda: tap(function(images(**shape)))


def of_vectors(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], None]:
    return lambda: tap(function(x(6)))


def relu_of_conv(net: tf.Tensor) -> tf.Tensor:
    with tf1.name_scope("conv1/"):
        return tf.nn.relu(tf.nn.bias_add(conv(net, "conv1", 4), weights("conv1/biases", 4)))


def depthwise(net: tf.Tensor) -> tf.Tensor:
    return tf1.nn.depthwise_conv2d_native(net, weights("w", 3, 3, 3, 2), [1, 2, 2, 1], "SAME")


def transposed(net: tf.Tensor, padding: str, stride: int, size: int) -> tf.Tensor:
    height, width = (
        (int(side) * stride if padding == "SAME" else (int(side) - 1) * stride + size)
        for side in net.shape[1:3]
    )
    shape = tf.stack([tf.shape(net)[0], height, width, 4])
    kernel = weights("w", size, size, 4, 3)
    return tf1.nn.conv2d_transpose(net, kernel, shape, [1, stride, stride, 1], padding)


def atrous(net: tf.Tensor, size: int) -> tf.Tensor:
    """A dilated convolution as TensorFlow 1 composes it."""
    kernel, pad = weights("w", 3, 3, 3, 4), 2 if size == 0 else 0
    height, width = int(net.shape[1]), int(net.shape[2])
    extra = [-(side + 2 * pad) % 2 for side in (height, width)]
    pads = [[pad, pad + more] for more in extra]
    net = tf.space_to_batch_nd(net, [2, 2], pads)
    net = tf1.nn.conv2d(net, kernel, 1, "VALID")
    net = tf.batch_to_space(net, [2, 2], [[0, more] for more in extra])
    return tf.nn.bias_add(net, weights("bias", 4))


def fused_norm(net: tf.Tensor) -> tf.Tensor:
    return tf1.nn.fused_batch_norm(
        net,
        weights("gamma", 3),
        weights("beta", 3),
        weights("moving_mean", 3),
        weights("moving_variance", 3, low=0.1),
        is_training=False,
    )[0]


def composed_norm(net: tf.Tensor, *, scale: bool = True, offset: bool = True) -> tf.Tensor:
    return tf.nn.batch_normalization(
        net,
        weights("moving_mean", 3),
        weights("moving_variance", 3, low=0.1),
        weights("beta", 3) if offset else None,
        weights("gamma", 3) if scale else None,
        1e-3,
    )


def layer_norm(net: tf.Tensor) -> tf.Tensor:
    mean, variance = tf.nn.moments(net, [1, 2, 3], keepdims=True)
    net = (net - mean) * tf1.rsqrt(variance + 1e-5)
    return net * weights("gamma", 3) + weights("beta", 3)


def group_norm(net: tf.Tensor) -> tf.Tensor:
    height, width = int(net.shape[1]), int(net.shape[2])
    parts = tf.reshape(net, [-1, height, width, 2, 2])
    mean, variance = tf.nn.moments(parts, [1, 2, 4], keepdims=True)
    parts = (parts - mean) / tf.sqrt(variance + 1e-3)
    return tf.reshape(parts, [-1, height, width, 4]) * weights("gamma", 4)


def squeeze_and_excite(net: tf.Tensor) -> tf.Tensor:
    mean = tf.reduce_mean(net, [1, 2], keepdims=True)
    return net * tf.sigmoid(conv(mean, "gate", 3, size=1))


def attention(net: tf.Tensor) -> tf.Tensor:
    tokens = tf.reshape(net, [-1, int(net.shape[1]) * int(net.shape[2]), 3])
    scores = tf.nn.softmax(tf.matmul(tokens, tokens, transpose_b=True) * 0.1)
    return tf.matmul(scores, tokens)


def parametric_relu(net: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(net) + weights("alpha", 3) * (net - tf.abs(net)) * 0.5


def inner_dropout(net: tf.Tensor) -> tf.Tensor:
    keep = tf1.placeholder_with_default(0.6, [], name="keep_prob")
    net = tf1.nn.dropout(tf.matmul(net, weights("fc6/weights", 6, 5)), keep_prob=keep)
    return tf.matmul(net, weights("fc7/weights", 5, 4))


def towers(net: tf.Tensor) -> tf.Tensor:
    kernel = weights("w", 3, 3, 3, 4)
    first, second = (tf1.nn.conv2d(part, kernel, 1, "SAME") for part in (net, -net))
    return tf.concat([first, second], 3)


def normalized_weights(net: tf.Tensor) -> tf.Tensor:
    kernel = weights("v", 6, 5)
    return tf.matmul(net, tf.nn.l2_normalize(kernel, 0) * weights("g", 5))


GRAPHS: dict[str, Callable[[], None]] = {
    "conv_bias_relu": of_images(relu_of_conv),
    "conv_stride_same": of_images(lambda net: conv(net, "c", 4, strides=2)),
    "conv_stride_valid": of_images(lambda net: conv(net, "c", 4, strides=2, padding="VALID")),
    "conv_even_kernel": of_images(lambda net: conv(net, "c", 4, size=4)),
    "conv_explicit": of_images(
        lambda net: conv(net, "c", 4, padding=[[0, 0], [1, 2], [0, 1], [0, 0]])
    ),
    "conv_dilated": of_images(lambda net: conv(net, "c", 4, dilations=2)),
    "conv_groups": of_images(
        lambda net: tf1.nn.conv2d(net, weights("w", 3, 3, 2, 6), 1, "SAME"), channels=4
    ),
    "conv_3d": lambda: tap(
        tf.nn.conv3d(x(4, 5, 6, 2), weights("w", 2, 3, 3, 2, 4), [1] * 5, "SAME")
    ),
    "depthwise": of_images(depthwise),
    "transposed_same": of_images(lambda net: transposed(net, "SAME", 2, 3)),
    "transposed_valid": of_images(lambda net: transposed(net, "VALID", 2, 3)),
    "transposed_even": of_images(lambda net: transposed(net, "SAME", 2, 4)),
    "atrous_same": of_images(lambda net: atrous(net, 0)),
    "atrous_valid": of_images(lambda net: atrous(net, 1)),
    "dense": of_vectors(
        lambda net: tf.tanh(tf.matmul(net, weights("w", 6, 5)) + weights("bias", 5))
    ),
    "dense_transposed": of_vectors(
        lambda net: tf.matmul(net, weights("w", 5, 6), transpose_b=True)
    ),
    "dense_normalized": of_vectors(normalized_weights),
    "attention": of_images(attention),
    "max_pool_same": of_images(lambda net: tf1.nn.max_pool(net, 3, 2, "SAME")),
    "max_pool_valid": of_images(lambda net: tf1.nn.max_pool(net, 3, 2, "VALID")),
    "avg_pool_same": of_images(lambda net: tf1.nn.avg_pool(net, 3, 2, "SAME")),
    "avg_pool_even": of_images(lambda net: tf1.nn.avg_pool(net, 2, 2, "SAME")),
    "mean_over_space": of_images(lambda net: tf.reduce_mean(net, [1, 2])),
    "max_over_space": of_images(lambda net: tf.reduce_max(net, [1, 2], keepdims=True)),
    "sum_over_channels": of_images(lambda net: tf.reduce_sum(net, -1)),
    "fused_batch_norm": of_images(fused_norm),
    "composed_batch_norm": of_images(composed_norm),
    "composed_batch_norm_without_scale": of_images(lambda net: composed_norm(net, scale=False)),
    "composed_batch_norm_without_offset": of_images(lambda net: composed_norm(net, offset=False)),
    "layer_norm": of_images(layer_norm),
    "group_norm": of_images(group_norm, channels=4),
    "local_response": of_images(lambda net: tf.nn.lrn(net, 2, 1.5, 0.1, 0.75), channels=7),
    "two_local_responses": of_images(
        lambda net: tf.nn.lrn(tf.nn.lrn(net, 2, 1.0, 0.1, 0.75), 2, 1.0, 0.1, 0.75), channels=7
    ),
    "l2_normalize": of_vectors(lambda net: tf.nn.l2_normalize(net, 1)),
    "scale_and_offset": of_images(lambda net: net * weights("scale", 3) + weights("shift", 3)),
    "offset_per_place": of_images(lambda net: net + weights("place", 9, 11, 3)),
    "weight_minus": of_vectors(lambda net: weights("w", 6) - net),
    "division_by_weight": of_vectors(lambda net: net / weights("w", 6, low=0.5)),
    "learned_number": of_images(lambda net: net * weights("scale")),
    "parametric_relu": of_images(parametric_relu),
    "leaky_relu": of_images(lambda net: tf.nn.leaky_relu(net, 0.3)),
    "activations": of_vectors(
        lambda net: (
            tf.nn.relu6(net * 4)
            + tf.nn.elu(net)
            + tf.nn.selu(net)
            + tf.nn.softplus(net)
            + tf.nn.softsign(net)
        )
    ),
    "softmax": of_vectors(tf.nn.softmax),
    "log_softmax": of_vectors(tf.nn.log_softmax),
    "arithmetic": of_vectors(
        lambda net: tf.exp(-tf.abs(net)) + tf1.pow(tf.square(net) + 1.0, 0.3) / 2.0 - net
    ),
    "means_subtracted": of_images(lambda net: (net - [3.0, 2.0, 1.0]) / 128.0),
    "squared_difference": of_vectors(lambda net: tf1.squared_difference(net, net[:, ::-1])),
    "sum_of_many": of_vectors(lambda net: tf.add_n([net, tf.sin(net), tf.cos(net)])),
    "maximum": of_vectors(lambda net: tf.maximum(net, tf.minimum(0.1 * net, 0.2))),
    "choice": of_vectors(lambda net: tf.where(net > 0, net, tf.zeros_like(net))),
    "clip": of_vectors(lambda net: tf.clip_by_value(net, -0.3, 0.8)),
    "squeeze_and_excite": of_images(squeeze_and_excite),
    "towers_with_the_same_weights": of_images(towers),
    "dropout": of_vectors(inner_dropout),
    "rgb_to_bgr": of_images(lambda net: net[..., ::-1]),
    "crop": of_images(lambda net: net[:, 1:-2, 2:, :2]),
    "every_second": of_images(lambda net: net[:, ::2, 1::2]),
    "one_place": of_images(lambda net: net[:, 0, -1]),
    "slice": of_images(lambda net: tf.slice(net, [0, 1, 2, 0], [-1, 3, 4, 2])),
    "split": of_images(lambda net: tf.concat(tf.split(net, [1, 2], 3)[::-1], -1)),
    "split_evenly": of_images(lambda net: tf.add(*tf.split(net, 2, 3)), channels=4),
    "unstack_and_stack": of_images(lambda net: tf.stack(tf.unstack(net, axis=3)[::-1], 1)),
    "gather": of_images(lambda net: tf.gather(net, [2, 0], axis=3)),
    "transpose": of_images(lambda net: tf.transpose(net, [0, 3, 1, 2])),
    "flatten": of_images(lambda net: tf.reshape(net, [-1, 9 * 11 * 3])),
    "flatten_by_shape": of_images(
        lambda net: tf.reshape(net, tf.stack([tf.shape(net)[0], tf.reduce_prod(tf.shape(net)[1:])]))
    ),
    "reshape": of_images(lambda net: tf.reshape(net, [-1, 11, 9, 3])),
    "squeeze": of_images(
        lambda net: tf.squeeze(tf.reduce_mean(net, [1, 2], keepdims=True), [1, 2])
    ),
    "expand_dims": of_vectors(lambda net: tf.expand_dims(net, 1)),
    "zero_padding": of_images(lambda net: tf.pad(net, [[0, 0], [1, 2], [0, 3], [0, 0]])),
    "channel_padding": of_images(lambda net: tf.pad(net, [[0, 0], [0, 0], [0, 0], [1, 2]])),
    "reflection": of_images(lambda net: tf.pad(net, [[0, 0], [1, 2], [2, 1], [0, 0]], "REFLECT")),
    "constant_padding": of_images(
        lambda net: tf.pad(net, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=2.0)
    ),
    "tile": of_images(lambda net: tf.tile(net, [1, 2, 1, 1])),
    "space_to_depth": of_images(lambda net: tf1.space_to_depth(net[:, :8, :8], 2)),
    "depth_to_space": of_images(lambda net: tf1.depth_to_space(net, 2), channels=8),
    "enlarged_nearest": of_images(lambda net: tf1.image.resize_nearest_neighbor(net, [18, 33])),
    "enlarged_bilinear": of_images(lambda net: tf.image.resize(net, [18, 22], "bilinear")),
    "stopped_gradient": of_vectors(lambda net: net + tf.stop_gradient(net)),
    "integers": lambda: tap(tf.cast(x(6, dtype=tf.uint8), tf.float32) / 255.0),
}
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "batch_statistics": (
        of_images(lambda net: (net - tf.reduce_mean(net, [0, 1, 2])) * weights("gamma", 3)),
        r"node 'Mean' \(Mean\).*mixes the images",
    ),
    "tied_weights": (
        of_vectors(
            lambda net: tf.matmul(
                tf.matmul(net, weights("w", 6, 5)),
                tf1.get_default_graph().get_tensor_by_name("w/read:0"),
                transpose_b=True,
            )
        ),
        r"shares the variable 'w:0'",
    ),
    "noise": (
        lambda: tap(x(6) + tf.random.normal([6])),
        r"random numbers",
    ),
    "legacy_bilinear": (
        of_images(lambda net: tf1.image.resize_bilinear(net, [18, 22])),
        r"\(ResizeBilinear\)",
    ),
    "hue": (of_images(lambda net: tf.image.adjust_hue(net, 0.1)), r"\(AdjustHue\)"),
}
