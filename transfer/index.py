"""What a checkpoint says that it has: keys, shapes and types, checked before TensorFlow reads it.

TensorFlow's own reader ends the process when an index holds a shape or an entry that makes no
sense, so it is only let at those that have been looked through here. V2 indexes and V1 checkpoints
are both sorted tables in the format of LevelDB (doc/table_format.md in its sources).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.framework.tensor_slice_pb2 import TensorSliceProto
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_MAX_KEY_BYTES = 2**14
_MAX_DIMENSIONS = 254  # TensorFlow's own limit
_MAX_ELEMENTS = 2**40
MAX_INDEX_BYTES = 2**28


@dataclass(frozen=True)
class Stored:
    """What is stored under a key: its whole shape, and its type."""

    shape: tuple[int, ...]
    dtype: tf.DType


def read_v2(path: Path) -> dict[str, Stored]:
    """The entries of a V2 index, all of them checked.

    Raises:
        ValueError: if the file is no index, or an entry makes no sense.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"it has over {MAX_INDEX_BYTES:,} bytes, too many for an index")
    entries: dict[str, Stored] = {}
    num_shards = None
    for key, value in table(path.read_bytes()):
        if not key:
            num_shards = _parse(BundleHeaderProto, value, key).num_shards
            continue
        entry = _parse(BundleEntryProto, value, key)
        stored = Stored(_shape(entry.shape, key), _dtype(entry.dtype, key))
        is_whole = not entry.slices and stored.dtype.size
        num_bytes = math.prod(stored.shape) * stored.dtype.size
        if (
            num_shards is None
            or not 0 <= entry.shard_id < num_shards
            or min(entry.offset, entry.size) < 0
            or (is_whole and entry.size != num_bytes)
        ):
            raise ValueError(f"its entry {_show(key)} makes no sense")
        for extents in entry.slices:
            _check_slice(extents, stored.shape, key)
        if not key.startswith(b"\0"):  # a part of a partitioned variable, under a key of its own
            entries[key.decode("utf-8", "replace")] = stored
    if num_shards is None:
        raise ValueError("it has no header")
    return entries


def read_v1(paths: Sequence[Path]) -> dict[str, Stored]:
    """What is in the files of a V1 checkpoint, all of it checked.

    Raises:
        ValueError: if a file is no checkpoint, or an entry makes no sense.
    """
    entries: dict[str, Stored] = {}
    for path in paths:
        if path.stat().st_size > 2**31 - 1:
            raise ValueError("it has over 2 GB, too many for a V1 checkpoint")
        first = next(table(path.read_bytes()), None)
        if first is None or first[0]:
            raise ValueError(f"{path.name} does not begin with a list of what is in it")
        for tensor in _parse(SavedTensorSlices, first[1], b"").meta.tensor:
            key = tensor.name.encode()
            stored = Stored(_shape(tensor.shape, key), _dtype(tensor.type, key))
            for extents in tensor.slice:
                _check_slice(extents, stored.shape, key)
            entries[tensor.name] = stored
    return entries


def table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table, in order."""
    if len(content) < _FOOTER_BYTES or content[-8:] != struct.pack("<Q", _MAGIC):
        raise ValueError("it is no table of TensorFlow, or it was cut short")
    footer = content[-_FOOTER_BYTES:]
    _, position = _handle(footer, 0)
    index, _ = _handle(footer, position)
    for _, value in _block(content, *index):
        yield from _block(content, *_handle(value, 0)[0])


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys, each written as what is new after a part of the one before, and values."""
    if offset + size + 5 > len(content):
        raise ValueError("a block of it lies outside of the file")
    if content[offset + size]:
        raise ValueError("it is compressed; write the checkpoint again with TensorFlow")
    block = content[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0] if len(block) >= 4 else 0
    end = len(block) - 4 * (restarts + 1)
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + added + length > end or added > _MAX_KEY_BYTES:
            raise ValueError("an entry of it lies outside of its block")
        key = key[:shared] + block[position : position + added]
        if len(key) > _MAX_KEY_BYTES:
            raise ValueError("a key of it is too long")
        position += added
        yield key, block[position : position + length]
        position += length


def _handle(content: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _varint(content, position)
    size, position = _varint(content, position)
    return (offset, size), position


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number in it does not end")


def _parse(kind, value: bytes, key: bytes):  # type: ignore[no-untyped-def]
    try:
        return kind.FromString(value)
    except DecodeError as error:
        raise ValueError(f"its entry {_show(key)} is damaged: {error}") from error


def _shape(proto: TensorShapeProto, key: bytes) -> tuple[int, ...]:
    shape = tuple(dim.size for dim in proto.dim)
    if proto.unknown_rank or len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError(f"its entry {_show(key)} has shape {list(shape)[:8]}")
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"its entry {_show(key)} has shape {list(shape)}, too large to be true")
    return shape


def _dtype(number: int, key: bytes) -> tf.DType:
    try:
        return tf.as_dtype(number)
    except TypeError:
        raise ValueError(f"its entry {_show(key)} has elements of unknown type {number}") from None


def _check_slice(extents: TensorSliceProto, shape: tuple[int, ...], key: bytes) -> None:
    fits = len(extents.extent) == len(shape) and all(
        extent.start >= 0
        and (not extent.HasField("length") or extent.length >= 0)
        and extent.start + extent.length <= size
        for extent, size in zip(extents.extent, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"its entry {_show(key)} has a slice that lies outside of {list(shape)}")


def _show(key: bytes) -> str:
    return repr(key.decode("utf-8", "replace")[:80])
