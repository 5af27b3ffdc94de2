"""Read the weights in Caffe's NetParameter, the contents of a ``.caffemodel`` file.

Field numbers from caffe.proto (github.com/BVLC/caffe, src/caffe/proto).
"""

from __future__ import annotations

import math

import numpy as np

from transfer.vgg.published import wire

_MAX_LAYERS, _MAX_BLOBS = 10_000, 16
# NetParameter: field of layers, now and before 2015, to the fields of their name and blobs.
_LAYERS = {100: (1, 7), 2: (4, 6)}
_LEGACY_SHAPE, _DATA, _SHAPE, _DIM = (1, 2, 3, 4), 5, 7, 1  # BlobProto, BlobShape


def arrays(data: memoryview) -> dict[str, np.ndarray]:
    """``<layer>/0`` (weights, ``[outputs, inputs, height, width]`` or ``[outputs, inputs]``) and
    ``<layer>/1`` (biases): views of the data; empty if the data are not a NetParameter.

    Raises:
        ValueError: if the network is damaged.
    """
    try:
        layers = [(number, value) for number, value in wire.fields(data) if number in _LAYERS]
    except ValueError:
        return {}
    if len(layers) > _MAX_LAYERS:
        raise ValueError(f"it has {len(layers):,} layers; expected at most {_MAX_LAYERS:,}")
    arrays_by_name = {}
    for number, layer in layers:
        name_field, blobs_field = _LAYERS[number]
        if isinstance(layer, int):
            return {}
        parts = [part for part in wire.fields(layer) if part[0] in (name_field, blobs_field)]
        name = next((wire.text(value) for field, value in parts if field == name_field), "")
        blobs = [value for field, value in parts if field == blobs_field]
        if len(blobs) > _MAX_BLOBS:
            raise ValueError(f"its layer {name!r} has {len(blobs):,} arrays")
        for index, blob in enumerate(blobs):
            arrays_by_name[f"{name}/{index}"] = _array(name, index, blob)
    return arrays_by_name


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
