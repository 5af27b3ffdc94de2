"""Read the constants of a frozen TensorFlow graph, without TensorFlow."""

from __future__ import annotations

import math

import numpy as np

from transfer.vgg.published import wire
from transfer.vgg.published.limits import MAX_ENTRIES


def arrays(data: memoryview) -> dict[str, np.ndarray]:
    """The float32 array constants of a frozen graph; empty if the data are not a graph.

    Field numbers from tensorflow/core/framework: graph, node_def, attr_value, tensor,
    tensor_shape and types.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        for number, node in wire.fields(data):
            if number == 1 and not isinstance(node, int):
                name, values = _constant(node)
                if values is not None:
                    arrays[name] = values
                if len(arrays) > MAX_ENTRIES:
                    return {}
    except ValueError:
        return {}
    return arrays


def _constant(node: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and value of a float32 array constant; the value is ``None`` for other nodes."""
    parts = dict(wire.fields(node))
    if bytes(_message(parts.get(2))) != b"Const":
        return "", None
    attributes = (dict(wire.fields(_message(v))) for n, v in wire.fields(node) if n == 5)
    value = next(
        (_message(a.get(2)) for a in attributes if bytes(_message(a.get(1))) == b"value"), None
    )
    if value is None:
        return "", None
    tensor = dict(wire.fields(_message(dict(wire.fields(value)).get(8))))
    if tensor.get(1) != 1:  # DT_FLOAT
        return "", None
    dims = [dict(wire.fields(_message(d))).get(1, 0) for n, d in
            wire.fields(_message(tensor.get(2))) if n == 2]  # fmt: skip
    shape = wire.integers(dims)
    content = _message(tensor.get(4)) or _message(tensor.get(5))
    # A tensor stored as one repeated value is not a weight.
    if not shape or min(shape) < 1 or math.prod(shape) * 4 != len(content):
        return "", None
    return wire.text(parts.get(1, memoryview(b""))), np.frombuffer(content, "<f4").reshape(shape)


def _message(value: wire.Value | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")
