"""Batch norm, local response normalization, dropout, and scales and offsets that are trained."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import canonical, data_inputs, operation_of
from transfer.layers.native.rules import rule
from transfer.layers.native.values import KEPT, SCALED
from transfer.layers.native.walk import Static, Walk

_SUMS = frozenset({"Add", "AddV2"})


@rule("FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3")
def _fused_batch_norm(walk: Walk, node: NodeDef) -> Any:
    images, *weights = walk.operands(node)
    if node.attr["is_training"].b:
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


def composed_batch_norm(walk: Walk, node: NodeDef, images: Any, scale: Static) -> Any:
    """The batch norm that begins with a product, as ``tf.nn.batch_normalization`` composes it:
    ``x * scale + (offset - mean * scale)``, where ``scale`` is ``rsqrt(variance + epsilon)``, times
    gamma if there is one. ``None`` if it is something else."""
    nodes = {n.name: n for n in walk.values.network.graph_def.node}

    def source(tensor: str, *operations: str) -> list[str] | None:
        """Operands of the node that makes a tensor, if it is one of these operations."""
        found = nodes.get(operation_of(tensor))
        while found is not None and found.op in ("Identity", "Reshape", "Squeeze"):
            tensor = canonical(found.input[0])
            found = nodes.get(operation_of(tensor))
        if found is None or found.op not in operations:
            return None
        return [canonical(edge) for edge in data_inputs(found)]

    last = walk.reader(node)
    if last is None or last.op not in (*_SUMS, "Sub"):
        return None
    edges = [canonical(edge) for edge in data_inputs(last)]
    shifts = [edge for edge in edges if operation_of(edge) != node.name]
    if len(shifts) != 1 or operation_of(shifts[0]) in walk.values.live:
        return None
    shift: str = shifts[0]
    offset, product = None, shift
    if last.op in _SUMS and (difference := source(shift, "Sub")) is not None:
        offset, product = difference
    elif last.op == "Sub" and edges[1] != shift:
        return None
    factors = source(product, "Mul")
    if factors is None or scale.tensor not in factors:
        return None
    mean = next((factor for factor in factors if factor != scale.tensor), None)
    if last.op in _SUMS and offset is None:  # without offset: + (-mean * scale)
        negated = None if mean is None else source(mean, "Neg")
        mean = None if negated is None else negated[0]
    gamma, inverse = None, source(scale.tensor, "Rsqrt")
    if inverse is None:
        for one, other in _both_ways(source(scale.tensor, "Mul")):
            if (inverse := source(one, "Rsqrt")) is not None:
                gamma = other
                break
    if inverse is None or mean is None:
        return None
    for variance, epsilon in _both_ways(source(inverse[0], *_SUMS)):
        value = walk.number(epsilon)
        if value is not None:
            weights = [
                None if name is None else walk.static_of(name)
                for name in (gamma, offset, mean, variance)
            ]
            return batch_norm(walk, [node, last], images, weights, value)
    return None


def _both_ways(pair: list[str] | None) -> list[list[str]]:
    return [] if pair is None or len(pair) != 2 else [pair, pair[::-1]]


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
