"""Shapes, parts and arrangements of values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import canonical
from transfer.layers.native.rules import rule
from transfer.layers.native.values import BATCHES
from transfer.layers.native.walk import Static, Walk

ops = keras.ops


@rule("ExpandDims Reshape Squeeze")
def _reshape(walk: Walk, node: NodeDef) -> Any:
    images, shape = walk.operands(node)[0], walk.shape(node)
    if not walk.values.rows(f"{node.name}:0") or None in shape[1:]:
        walk.refuse(node, f"its output {shape} does not have a row for each image")
    if tuple(images.shape) == shape:
        return images
    if len(shape) == 2 and shape[1] == np.prod(images.shape[1:]):
        return walk.layer(keras.layers.Flatten, [node], images, is_scope=False)
    return walk.layer(keras.layers.Reshape, [node], images, target_shape=shape[1:], is_scope=False)


@rule("Transpose")
def _transpose(walk: Walk, node: NodeDef) -> Any:
    images, order = walk.operands(node)[0], tuple(map(int, walk.static(node, 1)))
    if order[0] != 0:
        walk.refuse(node, "it moves the axis of the batch")
    return walk.layer(keras.layers.Permute, [node], images, dims=order[1:], is_scope=False)


@rule("Concat ConcatV2")
def _concatenation(walk: Walk, node: NodeDef) -> Any:
    operands = walk.operands(node)
    *parts, axis = operands if node.op == "ConcatV2" else [*operands[1:], operands[0]]
    if any(isinstance(part, Static) for part in parts):
        walk.refuse(node, "an operand does not depend on the images")
    axis = int(axis.value) % len(parts[0].shape)
    if axis == 0:
        walk.refuse(node, "it joins images to one batch")
    if len(parts) == 1:
        return parts[0]
    return walk.layer(keras.layers.Concatenate, [node], parts, axis=axis)


@rule("Pack")
def _stack(walk: Walk, node: NodeDef) -> Any:
    parts = walk.operands(node)
    if any(isinstance(part, Static) for part in parts):
        walk.refuse(node, "an operand does not depend on the images")
    axis = node.attr["axis"].i % (len(parts[0].shape) + 1)
    return walk.operation(node, ops.stack, parts, axis=axis)


@rule("MirrorPad Pad PadV2")
def _pad(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    pads = tuple((int(before), int(after)) for before, after in walk.static(node, 1))
    value = float(walk.static(node, 2)) if node.op == "PadV2" else 0.0
    if any(pads[0]):
        walk.refuse(node, "it pads the batch")
    mode = node.attr["mode"].s.decode().lower() if node.op == "MirrorPad" else "constant"
    if len(pads) == 4 and not any(pads[3]) and mode == "constant" and value == 0:
        return walk.layer(keras.layers.ZeroPadding2D, [node], images, padding=pads[1:3])
    constant: dict[str, Any] = {"constant_values": value} if value else {}
    return walk.operation(node, ops.pad, images, pads, mode=mode, **constant)


@rule("Split SplitV Unpack")
def _split(walk: Walk, node: NodeDef) -> Any:
    operands = walk.operands(node)
    images = operands[1 if node.op == "Split" else 0]
    rank = len(images.shape)
    if node.op == "Unpack":
        axis = node.attr["axis"].i % rank
        keys: list[Any] = list(range(images.shape[axis] or 0))
    else:
        axis = int(walk.static(node, 0 if node.op == "Split" else 2)) % rank
        if node.op == "Split":
            sizes = [(images.shape[axis] or 0) // node.attr["num_split"].i]
            sizes *= node.attr["num_split"].i
        else:
            sizes = [int(size) for size in np.ravel(walk.static(node, 1))]
            sizes = [(images.shape[axis] or 0) - sum(sizes) - 1 if s < 0 else s for s in sizes]
        ends = np.cumsum(sizes).tolist()
        keys = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if axis == 0:
        walk.refuse(node, "it splits the batch")
    before = (slice(None),) * axis
    return [walk.operation(node, _item, images, (*before, key)) for key in keys]


def _item(images: Any, key: Any) -> Any:
    return images[key]


@rule("Slice")
def _slice(walk: Walk, node: NodeDef) -> Any:
    images, begin, _ = walk.operands(node)
    starts = [int(start) for start in begin.value]
    if starts[0] or not walk.values.rows(f"{node.name}:0"):
        walk.refuse(node, "it takes some of the images of a batch")
    shape = walk.shape(node)
    key = [slice(start, start + (size or 0)) for start, size in zip(starts, shape, strict=True)]
    return walk.operation(node, _item, images, (slice(None), *key[1:]))


@rule("StridedSlice")
def _strided_slice(walk: Walk, node: NodeDef) -> Any:
    images, begin, end, strides = walk.operands(node)
    masks = {
        name: node.attr[f"{name}_mask"].i
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    key: list[Any] = []
    flipped: list[int] = []
    steps = strides.value
    axis = 0
    skipped = len(images.shape) - len(steps) + bin(masks["new_axis"]).count("1")
    for number, step in enumerate(map(int, steps)):
        has = {name: bool(mask >> number & 1) for name, mask in masks.items()}
        if has["ellipsis"]:
            key += [slice(None)] * (skipped + 1)
            axis += skipped + 1
            continue
        if has["new_axis"]:
            key.append(None)
            continue
        first, last = ([int(v[number]) for v in part.values] for part in (begin, end))
        if axis == 0:
            starts_at_0 = has["begin"] or not any(first)
            if has["shrink_axis"] or step != 1 or not starts_at_0:
                walk.refuse(node, "it takes some of the images of a batch")
            if not has["end"] and any(e < b for e, b in zip(last, BATCHES, strict=True)):
                walk.refuse(node, "it takes some of the images of a batch")
            key.append(slice(None))
        elif has["shrink_axis"]:
            key.append(first[0])
        elif step == -1 and has["begin"] and has["end"]:
            key.append(slice(None))
            flipped.append(axis)
        elif step < 1:
            walk.refuse(node, "it goes backwards over a part of an axis")
        else:
            bounds = (None if has["begin"] else first[0], None if has["end"] else last[0])
            key.append(slice(*bounds, None if step == 1 else step))
        axis += 1
    if flipped:
        images = _flip(walk, node, images, flipped)
    if all(part == slice(None) for part in key):
        return images
    return walk.operation(node, _item, images, tuple(key))


@rule("ReverseV2")
def _reverse(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    axes = [int(axis) % len(images.shape) for axis in np.ravel(walk.static(node, 1))]
    if 0 in axes:
        walk.refuse(node, "it reverses the batch")
    return _flip(walk, node, images, axes)


def _flip(walk: Walk, node: NodeDef, images: Any, axes: Iterable[int]) -> Any:
    for axis in axes:  # Keras 3.12 and older take one axis only on TensorFlow
        images = walk.operation(node, ops.flip, images, axis=axis)
    return images


@rule("Tile")
def _tile(walk: Walk, node: NodeDef) -> Any:
    images, repeats = walk.operands(node)[0], [int(n) for n in walk.static(node, 1)]
    if repeats[0] != 1:
        walk.refuse(node, "it repeats the batch")
    return walk.operation(node, ops.tile, images, repeats)


@rule("Gather GatherV2")
def _gather(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    axis = int(walk.static(node, 2)) if node.op == "GatherV2" else 0
    if isinstance(images, Static) or axis % len(images.shape) == 0:
        walk.refuse(node, "it takes some of the images of a batch")
    return walk.operation(node, ops.take, images, walk.static(node, 1), axis=axis)


@rule("DepthToSpace SpaceToDepth")
def _blocks(walk: Walk, node: NodeDef) -> Any:
    (images,) = walk.operands(node)
    _, height, width, channels = images.shape
    size = node.attr["block_size"].i
    if node.op == "DepthToSpace":
        parts, order = (height, width, size, size, channels // size**2), (1, 3, 2, 4, 5)
    else:
        parts = (height // size, size, width // size, size, channels)
        order = (1, 3, 2, 4, 5)
    target = walk.shape(node)[1:]
    net = walk.layer(
        keras.layers.Reshape, [node], images, target_shape=parts, is_scope=False, part="parts"
    )
    net = walk.layer(keras.layers.Permute, [node], net, dims=order, is_scope=False, part="order")
    return walk.layer(keras.layers.Reshape, [node], net, target_shape=target, is_scope=False)


@rule("ResizeBilinear ResizeNearestNeighbor")
def _enlargement(walk: Walk, node: NodeDef) -> Any:
    images, shape = walk.operands(node)[0], walk.shape(node)
    _, height, width, _ = images.shape
    factors = (shape[1] // height, shape[2] // width)
    kind = "nearest" if node.op == "ResizeNearestNeighbor" else "bilinear"
    is_whole = (factors[0] * height, factors[1] * width) == shape[1:3]
    half_pixel = node.attr["half_pixel_centers"].b
    if not is_whole or node.attr["align_corners"].b or (kind == "bilinear" and not half_pixel):
        walk.refuse(node, "Keras enlarges by whole factors, with aligned pixel centers")
    return walk.layer(
        keras.layers.UpSampling2D,
        [node],
        images,
        size=factors,
        interpolation=kind,
        data_format="channels_last",
    )


@rule("StopGradient")
def _stopped(walk: Walk, node: NodeDef) -> Any:
    return walk.operation(node, ops.stop_gradient, walk.operand(node, canonical(node.input[0])))
