"""Convolutions and matrix products, with the bias and the activation that follow them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import canonical
from transfer.layers.native.rules import rule
from transfer.layers.native.walk import Static, Tail, Walk


@rule("Conv2D Conv3D")
def _convolution(walk: Walk, node: NodeDef) -> Any:
    images, kernel = _images_and_kernel(walk, node)
    return _convolved(walk, node, [node], images, kernel, _ints(node, "dilations"))


def _convolved(
    walk: Walk, node: NodeDef, nodes: list[NodeDef], images: Any, kernel: Static, dilations: Any
) -> Any:
    """The output of a convolution that replaces ``nodes``, the last of which has its output."""
    shape = kernel.values[0].shape
    rank = len(shape) - 2
    images, padding = _padded(walk, node, images)
    tail = walk.tail(nodes[-1], shape[-1])
    make = {2: keras.layers.Conv2D, 3: keras.layers.Conv3D}[rank]
    return walk.layer(
        make,
        [*nodes[:-1], *tail.nodes],
        images,
        _weights(kernel, tail),
        filters=shape[-1],
        kernel_size=shape[:-2],
        strides=_ints(node, "strides") or (1,) * rank,
        dilation_rate=dilations or (1,) * rank,
        groups=images.shape[-1] // shape[-2],
        padding=padding,
        **_options(tail),
    )


@rule("DepthwiseConv2dNative")
def _depthwise(walk: Walk, node: NodeDef) -> Any:
    images, kernel = _images_and_kernel(walk, node)
    return _depthwise_convolved(walk, node, [node], images, kernel, _ints(node, "dilations"))


def _depthwise_convolved(
    walk: Walk, node: NodeDef, nodes: list[NodeDef], images: Any, kernel: Static, dilations: Any
) -> Any:
    height, width, channels, multiplier = kernel.values[0].shape
    images, padding = _padded(walk, node, images)
    tail = walk.tail(nodes[-1], channels * multiplier)
    return walk.layer(
        keras.layers.DepthwiseConv2D,
        [*nodes[:-1], *tail.nodes],
        images,
        _weights(kernel, tail),
        kernel_size=(height, width),
        strides=_ints(node, "strides") or (1, 1),
        dilation_rate=dilations or (1, 1),
        depth_multiplier=multiplier,
        padding=padding,
        **_options(tail),
    )


@rule("SpaceToBatchND")
def _dilated(walk: Walk, node: NodeDef) -> Any:
    """A dilated convolution, as TensorFlow 1 does it: rearranged, convolved, rearranged back."""
    convolution = walk.reader(node)
    back = None if convolution is None else walk.reader(convolution)
    kinds = {"Conv2D": _convolved, "DepthwiseConv2dNative": _depthwise_convolved}
    if (
        convolution is None
        or back is None
        or convolution.op not in kinds
        or back.op != "BatchToSpaceND"
        or convolution.attr["padding"].s != b"VALID"
        or set(_ints(convolution, "strides") or (1,)) != {1}
    ):
        walk.refuse(node, "it is not part of a dilated convolution")
    images = walk.operands(node)[0]
    block, paddings = walk.static(node, 1), walk.static(node, 2)
    if not np.array_equal(block, walk.static(back, 1)) or len(block) != 2:
        walk.refuse(node, "it is not undone after the convolution")
    kernel = walk.operand(convolution, canonical(convolution.input[1]))
    if not isinstance(kernel, Static):
        walk.refuse(convolution, "its kernel depends on the images")
    pads = paddings - walk.static(back, 2)  # cropping the output crops the input
    if (pads < 0).any():
        walk.refuse(node, "its output is cropped")
    if pads.any():
        images = walk.layer(
            keras.layers.ZeroPadding2D, [node], images, padding=_pairs(pads), is_scope=False
        )
    dilations = tuple(map(int, block))
    convolve = kinds[convolution.op]
    return convolve(walk, convolution, [node, convolution, back], images, kernel, dilations)


@rule("Conv2DBackpropInput")
def _transposed(walk: Walk, node: NodeDef) -> Any:
    _, kernel, images = walk.operands(node)
    if not isinstance(kernel, Static) or isinstance(images, Static):
        walk.refuse(node, "its kernel depends on the images")
    height, width, channels, _ = kernel.values[0].shape
    padding = node.attr["padding"].s.decode().lower()
    if padding == "explicit" or set(_ints(node, "dilations") or (1,)) != {1}:
        walk.refuse(node, "it has explicit padding or dilation")
    tail = walk.tail(node, channels)
    return walk.layer(
        keras.layers.Conv2DTranspose,
        tail.nodes,
        images,
        _weights(kernel, tail),
        filters=channels,
        kernel_size=(height, width),
        strides=_ints(node, "strides") or (1, 1),
        padding=padding,
        **_options(tail),
    )


@rule("BatchMatMul BatchMatMulV2 BatchMatMulV3 MatMul")
def _product(walk: Walk, node: NodeDef) -> Any:
    first, second = walk.operands(node)
    transposed = [
        any(node.attr[name].b for name in names if name in node.attr)
        for names in (("transpose_a", "adj_x"), ("transpose_b", "adj_y"))
    ]
    if isinstance(first, Static):
        walk.refuse(node, "its first operand does not depend on the images")
    if not isinstance(second, Static):
        if len(first.shape) < 3:
            walk.refuse(node, "it mixes the images of a batch")
        axes = [*range(len(first.shape) - 2), len(first.shape) - 1, len(first.shape) - 2]
        operands = [
            keras.ops.transpose(operand, axes) if flag else operand
            for operand, flag in zip((first, second), transposed, strict=True)
        ]
        return walk.operation(node, keras.ops.matmul, *operands)
    if transposed[0] or len(second.values[0].shape) != 2:
        walk.refuse(node, "it is not the product with one matrix for all images")
    kernel = second.to(tf.transpose) if transposed[1] else second
    width = second.values[0].shape[0 if transposed[1] else 1]
    tail = walk.tail(node, width)
    return walk.layer(
        keras.layers.Dense,
        tail.nodes,
        first,
        _weights(kernel, tail),
        units=width,
        **_options(tail),
    )


def _images_and_kernel(walk: Walk, node: NodeDef) -> tuple[Any, Static]:
    images, kernel = walk.operands(node)
    if isinstance(images, Static) or not isinstance(kernel, Static):
        walk.refuse(node, "its kernel depends on the images")
    return images, kernel


def _padded(walk: Walk, node: NodeDef, images: Any) -> tuple[Any, str]:
    """The images, padded if the node states how, and the padding that remains."""
    padding = node.attr["padding"].s.decode().lower()
    if padding != "explicit":
        return images, padding
    pairs = np.reshape(node.attr["explicit_paddings"].list.i, (-1, 2))[1:3]
    if pairs.any():
        images = walk.layer(
            keras.layers.ZeroPadding2D, [node], images, padding=_pairs(pairs), is_scope=False
        )
    return images, "valid"


def _pairs(values: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, pair)) for pair in values)


def _ints(node: NodeDef, attribute: str) -> tuple[int, ...]:
    """An attribute of all dimensions, without batch and channels."""
    return tuple(map(int, node.attr[attribute].list.i))[1:-1] if attribute in node.attr else ()


def _weights(kernel: Static, tail: Tail) -> list[Static]:
    return [kernel] if tail.bias is None else [kernel, tail.bias]


def _options(tail: Tail) -> dict[str, Any]:
    return {"use_bias": tail.bias is not None, "activation": tail.activation}
