"""Pooling, and reductions over the axes of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.layers.native.rules import rule
from transfer.layers.native.walk import Walk

ops = keras.ops
_POOLS = {
    "AvgPool": keras.layers.AveragePooling2D,
    "AvgPool3D": keras.layers.AveragePooling3D,
    "MaxPool": keras.layers.MaxPooling2D,
    "MaxPool3D": keras.layers.MaxPooling3D,
    "MaxPoolV2": keras.layers.MaxPooling2D,
}
_GLOBAL = {"Max": keras.layers.GlobalMaxPooling2D, "Mean": keras.layers.GlobalAveragePooling2D}
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "All": ops.all,
    "Any": ops.any,
    "Max": ops.max,
    "Mean": ops.mean,
    "Min": ops.min,
    "Prod": ops.prod,
    "Sum": ops.sum,
}


@rule(" ".join(_POOLS))
def _pool(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    if node.op == "MaxPoolV2":
        window, strides = (tuple(map(int, walk.static(node, i))) for i in (1, 2))
    else:
        window, strides = (tuple(node.attr[name].list.i) for name in ("ksize", "strides"))
    if {window[0], window[-1], strides[0], strides[-1]} != {1}:
        walk.refuse(node, "it pools over images or channels")
    window, strides = window[1:-1], strides[1:-1]
    padding = node.attr["padding"].s.decode().lower()
    if padding == "explicit":
        walk.refuse(node, "it has explicit padding")
    options: dict[str, Any] = {"pool_size": window, "strides": strides}
    pads = _same(images.shape[1:-1], window, strides) if padding == "same" else []
    if not any(map(any, pads)):
        return walk.layer(_POOLS[node.op], [node], images, padding="valid", **options)
    if node.op.startswith("MaxPool"):
        return walk.layer(_POOLS[node.op], [node], images, padding="same", **options)
    # Keras on PyTorch counts padded values if the padding is not symmetric.
    padded = walk.operation(node, ops.pad, images, [(0, 0), *pads, (0, 0)], part="padding")
    ones = np.pad(np.ones(images.shape[1:-1], np.float32), pads)
    counts = _counts(ones, window, strides)
    mean = walk.layer(_POOLS[node.op], [node], padded, padding="valid", **options)
    shares = (np.prod(window) / counts)[None, ..., None].astype(np.float32)
    return walk.operation(node, ops.multiply, mean, shares, part="correction")


def _same(sizes: Any, window: Any, strides: Any) -> list[tuple[int, int]]:
    """The padding before and after each axis of an image that TensorFlow calls SAME."""
    pads = []
    for size, width, stride in zip(sizes, window, strides, strict=True):
        missing = max((-(-size // stride) - 1) * stride + width - size, 0)
        pads.append((missing // 2, missing - missing // 2))
    return pads


def _counts(ones: np.ndarray, window: Any, strides: Any) -> np.ndarray:
    """The number of values that are not padding in each window."""
    windows = np.lib.stride_tricks.sliding_window_view(ones, tuple(window))
    windows = windows[tuple(slice(None, None, stride) for stride in strides)]
    return windows.sum(axis=tuple(range(ones.ndim, 2 * ones.ndim))).astype(np.float32)


@rule(" ".join(_REDUCTIONS))
def _reduction(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    rank = len(images.shape)
    axes = sorted({int(axis) % rank for axis in np.ravel(walk.static(node, 1))})
    keeps = node.attr["keep_dims"].b
    if not axes:
        return images
    if axes[0] == 0:
        walk.refuse(node, "it mixes the images of a batch")
    if node.op in _GLOBAL and rank == 4 and axes == [1, 2]:
        return walk.layer(_GLOBAL[node.op], [node], images, keepdims=keeps)
    return walk.operation(node, _REDUCTIONS[node.op], images, axis=tuple(axes), keepdims=keeps)


@rule("ArgMax")
def _argmax(walk: Walk, node: NodeDef) -> Any:
    images = walk.operands(node)[0]
    axis = int(walk.static(node, 1)) % len(images.shape)
    if axis == 0:
        walk.refuse(node, "it mixes the images of a batch")
    return walk.operation(node, ops.argmax, images, axis=axis)
