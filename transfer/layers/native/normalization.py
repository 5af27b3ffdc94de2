"""Batch norm, local response normalization, dropout, and scales and offsets that are trained."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import canonical
from transfer.graph.graph_def import uses_batch_statistics
from transfer.layers.native.rules import rule
from transfer.layers.native.values import KEPT, SCALED
from transfer.layers.native.walk import Static, Walk


@rule("FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3")
def _fused_batch_norm(walk: Walk, node: NodeDef) -> Any:
    images, *weights = walk.operands(node)
    if uses_batch_statistics(node):
        walk.refuse(node, "it normalizes with the statistics of the batch")
    return batch_norm(walk, [node], images, weights, node.attr["epsilon"].f or 1e-4)


@rule("BatchNormWithGlobalNormalization")
def _global_batch_norm(walk: Walk, node: NodeDef) -> Any:
    images, mean, variance, offset, scale = walk.operands(node)
    epsilon = node.attr["variance_epsilon"].f
    weights = [scale] if node.attr["scale_after_normalization"].b else [None]
    return batch_norm(walk, [node], images, [*weights, offset, mean, variance], epsilon)


def batch_norm(
    walk: Walk, nodes: list[NodeDef], images: Any, weights: list[Static | None], epsilon: float
) -> Any:
    """A frozen batch norm: like ``Backbone``, it always uses the stored statistics.

    Args:
        walk: the network.
        nodes: the nodes that it replaces.
        images: what it normalizes.
        weights: scale, offset, mean and variance; ``None`` for a scale or offset that is missing.
        epsilon: added to the variance.
    """
    if any(isinstance(w, keras.KerasTensor) for w in weights):
        raise ValueError("its statistics depend on the images")
    channels = images.shape[-1]
    flat = [w and w.to(lambda tensor: tf.reshape(tensor, [channels])) for w in weights]
    return walk.layer(
        keras.layers.BatchNormalization,
        nodes,
        images,
        [weight for weight in flat if weight is not None],
        epsilon=float(epsilon),
        scale=weights[0] is not None,
        center=weights[1] is not None,
        trainable=False,
    )


def scaled(
    walk: Walk,
    nodes: list[NodeDef],
    images: Any,
    scale: Static | None = None,
    offset: Static | None = None,
) -> Any:
    """A product and a sum with weights, which are trained: ``EinsumDense`` without a sum."""
    axes = "abcdefgh"[: len(images.shape)]
    kernel, bias = (_axes(images, weight) for weight in (scale, offset))
    biases = None if offset is None else bias
    by = kernel if scale is not None else axes[-1]
    weights: list[Static | np.ndarray] = [
        np.ones(images.shape[-1:], walk.dtype) if scale is None else _laid_out(scale, images, by)
    ]
    if offset is not None:
        sizes = [images.shape[axes.index(axis)] if axis in bias else 1 for axis in axes]
        first = min(map(axes.index, bias))
        weights.append(_shaped(_laid_out(offset, images, bias), sizes[first:]))
    return walk.layer(
        keras.layers.EinsumDense,
        nodes,
        images,
        weights,
        equation=f"{axes},{by}->{axes}",
        output_shape=tuple(images.shape[1:]),
        bias_axes=biases,
    )


def _axes(images: Any, weight: Static | None) -> str:
    """The axes of the images along which a weight differs; the last one if it is a number."""
    letters = "abcdefgh"[: len(images.shape)]
    if weight is None:
        return ""
    shape = weight.values[0].shape
    if len(shape) > len(letters):
        raise ValueError(f"its operand {weight.tensor!r} has more dimensions than the images")
    shape = (1,) * (len(letters) - len(shape)) + shape
    axes = "".join(a for a, size in zip(letters, shape, strict=True) if size != 1)
    if letters[0] in axes:
        raise ValueError(f"its operand {weight.tensor!r} depends on the place in the batch")
    return axes or letters[-1]


def _laid_out(weight: Static, images: Any, axes: str) -> Static:
    letters = "abcdefgh"[: len(images.shape)]
    sizes = [images.shape[letters.index(axis)] for axis in axes]
    if weight.values[0].size == 1:
        return weight.to(
            lambda tensor: tf.broadcast_to(tf.reshape(tensor, [1] * len(sizes)), sizes)
        )
    return _shaped(weight, sizes)


def _shaped(weight: Static, sizes: Any) -> Static:
    return weight.to(lambda tensor: tf.reshape(tensor, sizes))


@rule("LRN")
def _local_response(walk: Walk, node: NodeDef) -> Any:
    """``x / (bias + alpha * sum of squares of near channels) ** beta``; the sum is a 1x1
    convolution with a banded kernel."""
    (images,) = walk.operands(node)
    attributes = {"depth_radius": 5, "bias": 1.0, "alpha": 1.0, "beta": 0.5}
    for name in attributes:
        if name in node.attr:
            value = node.attr[name]
            attributes[name] = value.i if name == "depth_radius" else value.f
    channels = images.shape[-1]
    distance = np.abs(np.subtract.outer(np.arange(channels), np.arange(channels)))
    kernel = attributes["alpha"] * (distance <= attributes["depth_radius"])
    sums = walk.layer(
        keras.layers.Conv2D,
        [node],
        walk.operation(node, keras.ops.square, images, part="squares"),
        [kernel[None, None], np.full([channels], attributes["bias"])],
        filters=channels,
        kernel_size=(1, 1),
        trainable=False,
        is_scope=False,
        part="sums",
    )
    power = -float(attributes["beta"])
    factors = walk.operation(node, keras.ops.power, sums, power, part="factors")
    return walk.layer(keras.layers.Multiply, [node], [images, factors], is_scope=False)


@rule("Dropout")
def _dropout(walk: Walk, node: NodeDef) -> Any:
    source, amount, uniform = (canonical(edge) for edge in node.input)
    images = walk.operand(node, source)
    value = float(walk.operand(node, amount).value)
    rate = 1 - value if node.attr[KEPT].b else value
    if not 0 <= rate < 1:
        raise ValueError(f"its rate in training is {rate:g}")
    if rate == 0:
        return images
    if not node.attr[SCALED].b:
        raise ValueError("it does not scale the values that it keeps")
    mask, full = walk.values.shape(uniform), tuple(images.shape)
    shape = None
    if mask[1:] != full[1:] or mask[0] is not None:
        shape = tuple(
            1 if size == 1 and number else whole
            for number, (size, whole) in enumerate(zip(mask, full, strict=True))
        )
        if mask[0] is not None:
            raise ValueError("it drops the same values of all images")
    return walk.layer(keras.layers.Dropout, [node], images, rate=round(rate, 6), noise_shape=shape)
