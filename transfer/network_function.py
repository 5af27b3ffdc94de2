"""A network as a ``tf.function`` of its input and its weights."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from transfer.surgery import SEED, Network, canonical


def as_function(network: Network) -> Any:
    """``(inputs, list of weights, seed) -> output`` as a ``tf.function`` of its own.

    A function of its own, because a gradient tape does not see operations that are imported into
    the function in which it was opened. The seed, int32 ``[2]``, may be ``None`` where no random
    numbers are drawn.
    """
    names = [canonical(variable.name) for variable in network.variables]

    def apply(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> tf.Tensor:
        tensors = {network.input: inputs, **dict(zip(names, weights, strict=True))}
        if network.output in tensors:
            return tf.identity(tensors[network.output])
        tensors[SEED] = tf.zeros([2], tf.int32) if seed is None else seed
        # Each graph has its own part of the weights. The identity brings a tensor of an outer
        # function into this one, which the import does not.
        used = {canonical(edge) for node in network.graph_def.node for edge in node.input}
        return tf.graph_util.import_graph_def(
            network.graph_def,
            input_map={name: tf.identity(t) for name, t in tensors.items() if name in used},
            return_elements=[network.output],
            name="network",
        )[0]

    def run(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> tf.Tensor:
        inputs = as_input(network, inputs)
        if network.batch_size is None:
            return apply(inputs, weights, seed)

        def one(batch: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
            own = None if seed is None else tf.random.fold_in(seed, number)
            return apply(batch, weights, own)

        return _in_batches(one, inputs, network.batch_size)

    return tf.function(run, autograph=False, reduce_retracing=True)


def as_input(network: Network, images: tf.Tensor) -> tf.Tensor:
    """Images in the type that a network takes, and as vectors where it takes vectors."""
    if network.input_shape is not None and (len(network.input_shape), images.ndim) == (2, 4):
        images = tf.reshape(images, [-1, math.prod(images.shape[1:])])
    if network.input_dtype not in (None, images.dtype):
        if network.input_dtype.is_integer:
            images = tf.round(tf.cast(images, tf.float32))
        images = tf.saturate_cast(images, network.input_dtype)
    return images


def _in_batches(function: Any, inputs: tf.Tensor, size: int) -> tf.Tensor:
    """Apply a function that takes just ``size`` examples to any number of them; the last are filled
    up with the first ones, and what comes of those is dropped."""
    count = tf.shape(inputs)[0]
    num_batches = -(-count // size)
    missing = tf.range(num_batches * size - count) % tf.maximum(count, 1)
    filled = tf.concat([inputs, tf.gather(inputs, missing)], 0)
    batches = tf.reshape(filled, tf.concat([[num_batches, size], tf.shape(inputs)[1:]], 0))
    batches = tf.ensure_shape(batches, [None, size, *inputs.shape[1:]])
    one_batch = tf.TensorSpec([size, *inputs.shape[1:]], inputs.dtype)
    number = tf.TensorSpec([], tf.int32)
    (output,) = tf.function(function).get_concrete_function(one_batch, number).outputs
    outputs = tf.map_fn(
        lambda batch: function(*batch),
        (batches, tf.range(num_batches)),
        fn_output_signature=tf.TensorSpec(output.shape, output.dtype),
    )
    return tf.reshape(outputs, tf.concat([[-1], tf.shape(outputs)[2:]], 0))[:count]
