"""Read MATLAB files of version 5: structs, cells, text and arrays as plain Python values.

Sizes are checked against the bytes of the file, and nesting is limited, before memory is allocated.

Source: "MAT-File Format", MathWorks, chapter 1.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy as np

_COMPRESSED, _MATRIX = 15, 14
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_TEXT = {1: "utf-8", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _OBJECT, _CHAR = 1, 2, 3, 4
_IS_COMPLEX = 0x800
_MAX_DEPTH, _MAX_ELEMENTS, _MAX_DIMENSIONS = 12, 200_000, 8
_CHUNK = 2**20


def variables(data: memoryview, max_bytes: int) -> dict[str, Any]:
    """The variables of a file by name. A struct array is a list of dictionaries (a single struct is
    a dictionary), a cell array a list, text a ``str``, a numeric array a NumPy array; anything else
    is ``None``.

    Args:
        data: the whole file, beginning with its header of 128 bytes.
        max_bytes: limit of all decompressed data.

    Raises:
        ValueError: if the file is damaged, larger or nested deeper.
    """
    order = "<" if bytes(data[126:128]) == b"IM" else ">"
    values, position, left = {}, 128, max_bytes
    reader = _Reader(order)
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        content = data[position + 8 : position + 8 + size]
        if len(content) < size:
            raise ValueError("it was cut short")
        if kind == _COMPRESSED:
            content = _decompressed(content, order, left)
            left -= len(content)
            kind, content, _ = reader.element(content, 0)
        if kind == _MATRIX:
            name, value = reader.matrix(content, 0)
            values[name] = value
        position += 8 + size
    return values


def _decompressed(data: memoryview, order: str, max_bytes: int) -> memoryview:
    """The single element in compressed data, up to its declared size."""
    decompressor, result, size = zlib.decompressobj(), bytearray(), 8
    try:
        for start in range(0, len(data), _CHUNK):
            rest = bytes(data[start : start + _CHUNK])
            while rest and len(result) < size:
                result += decompressor.decompress(rest, size - len(result))
                rest = decompressor.unconsumed_tail
                if len(result) == size == 8:
                    size += struct.unpack(f"{order}II", result)[1]
                    if size > max_bytes:
                        raise ValueError(
                            f"its arrays would take over {max_bytes:,} bytes; a VGG takes less "
                            "than half of that"
                        )
    except zlib.error as error:
        raise ValueError(f"it is damaged: {error}") from error
    return memoryview(result)


class _Reader:
    def __init__(self, order: str):
        self._order = order
        self._left = _MAX_ELEMENTS

    def element(self, data: memoryview, position: int) -> tuple[int, memoryview, int]:
        """Type and content of an element, and the position of the next one."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has over {_MAX_ELEMENTS:,} elements")
        if position + 8 > len(data):
            raise ValueError("it was cut short")
        kind, size = struct.unpack_from(f"{self._order}II", data, position)
        if kind >> 16:  # small element: type and size in four bytes, content in four
            kind, size, begin = kind & 0xFFFF, kind >> 16, position + 4
            end = position + 8
            if size > 4:
                raise ValueError(f"it has {size} bytes where four are")
        else:
            begin = position + 8
            end = begin + size + -size % 8
        if begin + size > len(data):
            raise ValueError("it was cut short")
        return kind, data[begin : begin + size], end

    def matrix(self, data: memoryview, depth: int) -> tuple[str, Any]:
        """Name and value of an array of any class."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested over {_MAX_DEPTH} deep")
        if not data:  # an empty cell
            return "", None
        _, flags, position = self.element(data, 0)
        if len(flags) < 4:
            raise ValueError("it has an array without its flags")
        (word,) = struct.unpack_from(f"{self._order}I", flags)
        kind = word & 0xFF
        _, dims, position = self.element(data, position)
        shape = self._shape(dims)
        _, name, position = self.element(data, position)
        value: Any = None
        if kind == _CELL:
            value = self._cells(data, position, math.prod(shape), depth)
        elif kind in (_STRUCT, _OBJECT):
            if kind == _OBJECT:
                _, _, position = self.element(data, position)  # its class
            value = self._structs(data, position, math.prod(shape), depth)
        elif kind == _CHAR:
            encoding, content, _ = self.element(data, position)
            value = bytes(content).decode(self._encoding(encoding), "replace")
        elif _CHAR < kind <= 15 and kind != 5 and not word & _IS_COMPLEX:
            encoding, content, _ = self.element(data, position)
            value = self._numbers(encoding, content, shape)
        return bytes(name).decode("latin1"), value

    def _shape(self, data: memoryview) -> tuple[int, ...]:
        if not 8 <= len(data) <= 4 * _MAX_DIMENSIONS:
            raise ValueError(f"it has an array of {len(data) // 4} dimensions")
        shape = struct.unpack_from(f"{self._order}{len(data) // 4}i", data)
        if min(shape) < 0:
            raise ValueError(f"it has an array of shape {shape}")
        return shape

    def _check_count(self, count: int, data: memoryview, position: int) -> None:
        if count * 8 > len(data) - position:
            raise ValueError(f"it has {count:,} elements in {len(data) - position:,} bytes")

    def _cells(self, data: memoryview, position: int, count: int, depth: int) -> list[Any]:
        self._check_count(count, data, position)
        values = []
        for _ in range(count):
            _, content, position = self.element(data, position)
            values.append(self.matrix(content, depth + 1)[1])
        return values

    def _structs(self, data: memoryview, position: int, count: int, depth: int) -> Any:
        _, length, position = self.element(data, position)
        if len(length) < 4:
            raise ValueError("it has a struct without names")
        (width,) = struct.unpack_from(f"{self._order}i", length)
        _, names, position = self.element(data, position)
        if width < 1 or len(names) > 64 * 1000:
            raise ValueError(f"it has a struct with names of {width} bytes")
        fields = [
            bytes(names[at : at + width]).split(b"\0")[0].decode("latin1")
            for at in range(0, len(names), width)
        ]
        self._check_count(count * max(len(fields), 1), data, position)
        structs = []
        for _ in range(count):
            values = {}
            for field in fields:
                _, content, position = self.element(data, position)
                values[field] = self.matrix(content, depth + 1)[1]
            structs.append(values)
        return structs[0] if count == 1 else structs

    def _encoding(self, kind: int) -> str:
        if kind not in _TEXT:
            raise ValueError(f"it has text of type {kind}")
        encoding = _TEXT[kind]
        return encoding if encoding == "utf-8" else encoding + "lb"[self._order == ">"] + "e"

    def _numbers(self, encoding: int, data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the data. MATLAB stores floating-point arrays of whole numbers as smaller
        integers, which stay integers here: as float64 they would take up to eight times as much."""
        if encoding not in _NUMBERS:
            raise ValueError(f"it has numbers of type {encoding}")
        dtype = np.dtype(self._order + _NUMBERS[encoding])
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"it has an array {shape} in {len(data):,} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order="F")
