"""Read the weights in Caffe's NetParameter, the contents of a ``.caffemodel`` file.

Field numbers from caffe.proto (github.com/BVLC/caffe, src/caffe/proto).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from transfer.vgg.published import caffe_layers, wire
from transfer.vgg.published.caffe_layers import FIELDS

_MAX_LAYERS, _MAX_BLOBS, _MAX_TENSORS = 10_000, 16, 100_000
_LEGACY_SHAPE, _DATA, _SHAPE, _DIM = (1, 2, 3, 4), 5, 7, 1  # BlobProto, BlobShape


class Network(NamedTuple):
    """``arrays``: ``<layer>/0`` (weights, ``[outputs, inputs, height, width]`` or ``[outputs,
    inputs]``) and ``<layer>/1`` (biases), views of the file. ``no_head``: why the layers after the
    convolutions are not those of a VGG; empty if they may be. ``unused``: names of arrays that
    its features do not depend on."""

    arrays: dict[str, np.ndarray]
    no_head: str = ""
    unused: frozenset[str] = frozenset()


def read(data: memoryview) -> Network | None:
    """Read a network; ``None`` if the data are not a NetParameter with weights.

    Raises:
        ValueError: if the network is damaged, or computes its features in another way than a VGG.
    """
    try:
        messages = [(number, value) for number, value in wire.fields(data) if number in FIELDS]
    except ValueError:
        return None
    if len(messages) > _MAX_LAYERS:
        raise ValueError(f"it has {len(messages):,} layers; expected at most {_MAX_LAYERS:,}")
    arrays: dict[str, np.ndarray] = {}
    layers = []
    num_tensors = 0
    for number, message in messages:
        if isinstance(message, int):
            return None
        layer = caffe_layers.read(number, message)
        layers.append(layer)
        num_tensors += len(layer.bottoms) + len(layer.tops)
        if num_tensors > _MAX_TENSORS:
            raise ValueError(f"its layers have over {_MAX_TENSORS:,} inputs and outputs")
        if layer.blobs and f"{layer.name}/0" in arrays:
            raise ValueError(f"it has two layers {layer.name!r} with arrays")
        arrays |= _arrays(layer.name, layer.blobs)
    if not arrays:
        return None
    caffe_layers.check(layers)
    beside = caffe_layers.beside(layers)
    unused = frozenset(name for name in arrays if name.rpartition("/")[0] in beside)
    return Network(arrays, caffe_layers.no_head(layers), unused)


def _arrays(name: str, blobs: Sequence[wire.Value]) -> dict[str, np.ndarray]:
    if len(blobs) > _MAX_BLOBS:
        raise ValueError(f"its layer {name!r} has {len(blobs):,} arrays")
    return {f"{name}/{index}": _array(name, index, blob) for index, blob in enumerate(blobs)}


def _array(name: str, index: int, blob: wire.Value) -> np.ndarray:
    legacy = dict.fromkeys(_LEGACY_SHAPE, 0)
    content: wire.Value = memoryview(b"")
    shape: tuple[int, ...] = ()
    for field, value in wire.fields(memoryview(b"") if isinstance(blob, int) else blob):
        if field in legacy and isinstance(value, int):
            legacy[field] = value
        elif field == _DATA:
            content = value
        elif field == _SHAPE and not isinstance(value, int):
            shape = wire.integers([dim for number, dim in wire.fields(value) if number == _DIM])
    shape = shape or tuple(legacy.values())
    num_bytes = 0 if isinstance(content, int) else len(content)
    if isinstance(content, int) or min(shape) < 1 or math.prod(shape) * 4 != num_bytes:
        raise ValueError(f"its layer {name!r} has {num_bytes // 4} values for {shape}")
    # Older Caffe versions store four dimensions, padded with leading ones.
    while len(shape) > 1 and shape[0] == 1 and index == 1:
        shape = shape[1:]
    if len(shape) == 4 and shape[:2] == (1, 1):
        shape = shape[2:]
    return np.frombuffer(content, "<f4").reshape(shape)
