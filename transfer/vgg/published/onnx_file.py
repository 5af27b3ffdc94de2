"""Read the messages of an ONNX file: nodes, inputs, and tensors as views of the file.

Current versions of torch.onnx save the arrays of large models in a file beside it, which is read,
and no other file. Field numbers from onnx.proto (github.com/onnx/onnx), keys of external data from
its docs/ExternalData.md.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfer.vgg.published import wire
from transfer.vgg.published.limits import check_total

_TYPES = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}  # TensorProto.DataType
_DATA = {1: 4, 6: 5, 7: 7, 11: 10}  # field of TensorProto with the numbers of a type


@dataclass(frozen=True)
class Node:
    """An operation: ``kind`` is its type; ``inputs`` and ``outputs`` are names of tensors."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class SideFiles:
    """The files beside an ONNX file with some of its arrays, in a folder; ``None`` refuses them."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._files: dict[Path, memoryview] = {}
        self._left: dict[Path, int] = {}
        self._num_bytes = 0

    @property
    def paths(self) -> list[Path]:
        """The files that arrays were read from."""
        return sorted(self._files)

    def read(self, name: str, place: dict[str, str]) -> memoryview:
        """The bytes of an array, a view of the file.

        Args:
            name: name of the array, for messages.
            place: ``location``, ``offset`` and ``length``, as in ``TensorProto.external_data``.

        Raises:
            ValueError: if they are not in a file of this folder, or shared with other arrays.
        """
        location = place.get("location", "")
        path = (self._folder or Path()) / location
        is_beside = Path(location).name == location and location not in ("", "..")
        if self._folder is None or not is_beside:
            raise ValueError(
                f"its array {name!r} lies in another file, {location!r}, which is not beside it; "
                "save the model in one file (onnx.save_model with save_as_external_data=False)"
            )
        if path.is_symlink():
            raise ValueError(
                f"its array {name!r} lies in {location!r}, which is a symbolic link and not "
                "followed; copy both files into one folder"
            )
        if not path.is_file():
            raise ValueError(
                f"its array {name!r} lies in {location!r}; put that file beside it, or save the "
                "model in one file (torch.onnx.export with external_data=False)"
            )
        if path not in self._files:
            size = path.stat().st_size
            self._num_bytes += size
            check_total(self._num_bytes)
            self._left[path], self._files[path] = size, memoryview(b"")
            if size:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._files[path] = memoryview(mapped)
        data = self._files[path]
        offset, length = (place.get(key, default) for key, default in
                          (("offset", "0"), ("length", str(len(data)))))  # fmt: skip
        if not (offset.isdecimal() and length.isdecimal() and len(offset + length) < 40):
            raise ValueError(f"its array {name!r} is at {offset!r} of {location!r}")
        content = data[int(offset) : int(offset) + int(length)]
        self._left[path] -= len(content)  # overlapping arrays would take any amount of memory
        if len(content) < int(length) or self._left[path] < 0:
            raise ValueError(f"its array {name!r} is outside of {location!r}, or overlaps another")
        return content


def node_of(message: memoryview, beside: SideFiles | None = None) -> Node:
    """Read a NodeProto; ``beside`` has the arrays of its attributes that lie in other files."""
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    attributes: dict[str, Any] = {}
    for number, value in wire.fields(message):
        if number in texts:
            texts[number].append(wire.text(value))
        elif number == 5 and isinstance(value, memoryview):
            name, found = _attribute(value, beside)
            attributes[name] = found
    kind = (texts[4] or [""])[0]
    name = (texts[3] or [""])[0] or (texts[2] or [kind])[0]
    return Node(kind, name, texts[1], texts[2], attributes)


def _attribute(message: memoryview, beside: SideFiles | None) -> tuple[str, Any]:
    """Name and value of an attribute; ``None`` for graphs and other kinds."""
    name = ""
    value: Any = None
    integers: list[wire.Value] = []
    for number, content in wire.fields(message):
        if number == 1:
            name = wire.text(content)
        elif number == 2 and isinstance(content, memoryview) and len(content) == 4:
            value = float(np.frombuffer(content, "<f4")[0])
        elif number == 3 and isinstance(content, int):
            value = _signed(content)
        elif number == 4 and isinstance(content, memoryview):
            value = bytes(content[:1000])
        elif number == 5 and isinstance(content, memoryview):
            value = tensor_of(content, beside)[1]
        elif number == 8:
            integers.append(content)
    if integers:
        value = tuple(_signed(number) for number in wire.integers(integers))
    return name, value


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def tensor_of(message: memoryview, beside: SideFiles | None = None) -> tuple[str, np.ndarray]:
    """Name and values of a tensor: a view of the file where possible."""
    name, kind, content, is_external = "", 0, memoryview(b""), False
    place: dict[str, str] = {}
    dims: list[wire.Value] = []
    numbers: dict[int, list[wire.Value]] = {}
    for number, value in wire.fields(message):
        if number == 1:
            dims.append(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = wire.text(value)
        elif number == 9 and isinstance(value, memoryview):
            content = value
        elif number in (13, 14) and value:
            is_external = True
            if isinstance(value, memoryview):
                entry = dict(wire.fields(value))
                place[wire.text(entry.get(1, 0))] = wire.text(entry.get(2, 0))
        elif number in _DATA.values():
            numbers.setdefault(number, []).append(value)
    if is_external:
        content = (beside or SideFiles(None)).read(name, place)
    if kind not in _TYPES:
        return name, np.zeros(0, np.float32)
    shape = wire.integers(dims)
    dtype = np.dtype(_TYPES[kind])
    count = math.prod(shape)
    packed = numbers.get(_DATA.get(kind, 0), [])
    if len(content) or not packed:
        pass
    elif kind in (6, 7):
        values = [_signed(number) for number in wire.integers(packed, 1000)]
        content = memoryview(np.array(values, dtype).tobytes())
    elif len(packed) == 1 and isinstance(packed[0], memoryview):
        content = packed[0]
    else:
        content = memoryview(b"".join(bytes(v) for v in packed if isinstance(v, memoryview)))
    if max((0, *shape)) > 2**31 or count * dtype.itemsize != len(content):
        raise ValueError(f"its array {name!r} has {len(content):,} bytes for shape {shape}")
    values_of = np.frombuffer(content, dtype).reshape(shape)
    return name, values_of if kind in (1, 6, 7) else values_of.astype(np.float32)


def value_info(message: memoryview) -> tuple[str, list[int]]:
    """Name and shape of an input; 0 for an unknown extent."""
    name, shape = "", list[int]()
    for number, value in wire.fields(message):
        if number == 1:
            name = wire.text(value)
        elif number == 2:
            kind = _child(_child(value, 1), 2)  # TypeProto.tensor_type.shape
            for dim_number, dim in wire.fields(kind):
                if dim_number == 1 and isinstance(dim, memoryview) and len(shape) < 8:
                    extent = dict(wire.fields(dim)).get(1, 0)
                    shape.append(extent if isinstance(extent, int) and extent < 2**31 else 0)
    return name, shape


def _child(message: wire.Value, number: int) -> memoryview:
    if isinstance(message, memoryview):
        for found, value in wire.fields(message):
            if found == number and isinstance(value, memoryview):
                return value
    return memoryview(b"")
