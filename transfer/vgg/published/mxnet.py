"""Read the arrays of MXNet's ``.params`` files.

Source: github.com/apache/mxnet, src/ndarray/ndarray.cc: NDArray::Save and NDArray::LegacyLoad.
MXNet 1 writes version 2; older files have arrays of version 1, or without a version.
"""

from __future__ import annotations

import math
import re
import struct

import numpy as np

MAGIC = struct.pack("<QQ", 0x112, 0)
"""Begins a list of arrays."""
_VERSION_1, _VERSION_2 = 0xF993FAC8, 0xF993FAC9
_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_MAX_ARRAYS, _MAX_DIMENSIONS, _MAX_NAME = 20_000, 8, 1000
_PARTS = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
"""Names of parameters, and those of PyTorch."""
# Names of the layers of Gluon's VGGs, which are numbered in each class. Source: apache/mxnet,
# python/mxnet/gluon/model_zoo/vision/vgg.py: VGG._make_features.
_GLUON = re.compile(r"vgg\d+_(conv|batchnorm)(\d{1,3})(?=\.)")
_GLUON_NORM = re.compile(r"vgg\d+_batchnorm\d+\.")


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
        (magic,) = take("<I")
        is_versioned = magic in (_VERSION_1, _VERSION_2)
        (kind,) = take("<i") if magic == _VERSION_2 else (0,)
        (dimensions,) = take("<I") if is_versioned else (magic,)
        if kind != 0 or not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(
                f"it has an array of version {magic:#x}, storage {kind} and {dimensions:,} "
                f"dimensions; expected at most version {_VERSION_2:#x}, dense storage and 1 to "
                f"{_MAX_DIMENSIONS} dimensions, as MXNet 1 saves them"
            )
        shape = take(f"<{dimensions}{'q' if is_versioned else 'I'}")
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
    named = {_torch_name(name): value for name, value in zip(names, values, strict=True)}
    if any(_GLUON_NORM.match(name) for name in named):
        return {_numbered(name): value for name, value in named.items()}
    return named


def _torch_name(name: str) -> str:
    name = name.removeprefix("arg:").removeprefix("aux:")
    for part, torch_part in _PARTS.items():
        if name.endswith((f"_{part}", f".{part}")):
            return f"{name[: -len(part) - 1]}.{torch_part}"
    return name


def _numbered(name: str) -> str:
    """A name of Gluon's VGG with batch norm by its place, where a batch norm directly follows its
    convolution: ``vgg0_batchnorm2.weight`` becomes ``features.7.weight``."""
    match = _GLUON.match(name)
    if match is None:
        return name
    place = 3 * int(match[2]) + (match[1] == "batchnorm")
    return f"features.{place}{name[match.end() :]}"
