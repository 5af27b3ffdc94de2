"""Read the arrays of MXNet's ``.params`` files.

Source: github.com/apache/mxnet, src/ndarray/ndarray.cc: NDArray::Save of version 2, which MXNet 1
writes. Other versions are refused by name.
"""

from __future__ import annotations

import math
import struct

import numpy as np

MAGIC = struct.pack("<QQ", 0x112, 0)
"""Begins a list of arrays."""
_ARRAY = 0xF993FAC9
_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_MAX_ARRAYS, _MAX_DIMENSIONS, _MAX_NAME = 20_000, 8, 1000


def arrays(data: memoryview) -> dict[str, np.ndarray]:
    """Views of the data by name, without the ``arg:`` and ``aux:`` of symbolic models, as
    ``conv1_1.weight``.

    Raises:
        ValueError: if the file is damaged, or of another version.
    """
    position = len(MAGIC)

    def take(layout: str) -> tuple[int, ...]:
        nonlocal position
        size = struct.calcsize(layout)
        if position + size > len(data):
            raise ValueError("it was cut short")
        position += size
        return struct.unpack_from(layout, data, position - size)

    def count() -> int:
        (number,) = take("<Q")
        if number > _MAX_ARRAYS:
            raise ValueError(f"it has {number:,} arrays; expected at most {_MAX_ARRAYS:,}")
        return number

    values = []
    for _ in range(count()):
        magic, kind, dimensions = take("<IiI")
        if magic != _ARRAY or kind != 0:
            raise ValueError(
                f"it has an array of version {magic:#x} and storage {kind}; expected {_ARRAY:#x} "
                "and dense storage, as mx.nd.save of MXNet 1 writes"
            )
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"it has an array of {dimensions:,} dimensions")
        shape = take(f"<{dimensions}q")
        _, _, code = take("<iii")  # device, its number, type
        if code not in _TYPES or min(shape) < 0:
            raise ValueError(f"it has an array {shape} of type {code}")
        dtype = np.dtype(_TYPES[code])
        size = math.prod(shape) * dtype.itemsize
        if size > len(data) - position:
            raise ValueError(f"it has an array {shape} in {len(data) - position:,} bytes")
        values.append(np.frombuffer(data[position : position + size], dtype).reshape(shape))
        position += size
    names = []
    for _ in range(count()):
        (size,) = take("<Q")
        if size > min(_MAX_NAME, len(data) - position):
            raise ValueError(f"it has a name of {size:,} bytes")
        names.append(bytes(data[position : position + size]).decode("utf-8", "replace"))
        position += size
    if len(names) != len(values):
        raise ValueError(f"it has {len(names)} names for {len(values)} arrays")
    return {_torch_name(name): value for name, value in zip(names, values, strict=True)}


def _torch_name(name: str) -> str:
    name = name.removeprefix("arg:").removeprefix("aux:")
    for part in ("weight", "bias", "running_mean", "running_var"):
        if name.endswith(f"_{part}"):
            return f"{name[: -len(part) - 1]}.{part}"
    return name
