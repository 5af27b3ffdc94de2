"""Validate the index of a checkpoint (keys, shapes, dtypes) before TensorFlow reads it.

TensorFlow's own reader aborts the process if an index contains an invalid shape or entry, so it
only reads checkpoints validated here. V2 indexes and V1 checkpoints are both sorted tables in the
format of LevelDB (doc/table_format.md in its sources).
"""

from __future__ import annotations

import contextlib
import math
import mmap
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
_BLOCK_TRAILER_BYTES = 5
# Keys are prefix-compressed, so that a small file may contain many long keys. A VGG with its
# optimizer has about a hundred keys.
_MAX_KEY_BYTES = 2**14
_MAX_KEYS = 2**18
_MAX_BYTES_OF_KEYS = 2**26
_MAX_EXTENTS = 2**18  # of slices, one per dimension
_MAX_VALUE_BYTES = 2**20  # of the description of a variable
_MAX_LIST_BYTES = 2**24  # of the list of all variables in a V1 checkpoint
_MAX_DIMENSIONS = 254  # TensorFlow's own limit
_MAX_ELEMENTS = 2**40
MAX_INDEX_BYTES = 2**25


@dataclass(frozen=True)
class TensorEntry:
    """Full shape and dtype of the tensor stored under a key."""

    shape: tuple[int, ...]
    dtype: tf.DType


def read_v2(path: Path) -> dict[str, TensorEntry]:
    """Read and validate the entries of a V2 index.

    Raises:
        ValueError: if the file is not an index, or an entry is invalid.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"it has over {MAX_INDEX_BYTES:,} bytes, too many for an index")
    entries: dict[str, TensorEntry] = {}
    num_shards, num_extents = None, 0
    for key, value in table(path.read_bytes(), _MAX_VALUE_BYTES):
        if not key:
            num_shards = _parse(BundleHeaderProto, value, key).num_shards
            continue
        entry = _parse(BundleEntryProto, value, key)
        stored = TensorEntry(_shape(entry.shape, key), _dtype(entry.dtype, key))
        is_whole = not entry.slices and stored.dtype.size
        num_bytes = math.prod(stored.shape) * stored.dtype.size
        if (
            num_shards is None
            or not 0 <= entry.shard_id < num_shards
            or min(entry.offset, entry.size) < 0
            or (is_whole and entry.size != num_bytes)
        ):
            raise ValueError(f"its entry {_show(key)} is invalid")
        num_extents += _check_slices(entry.slices, stored.shape, key)
        if num_extents > _MAX_EXTENTS:
            raise ValueError(f"it has over {_MAX_EXTENTS:,} slices, too many for a checkpoint")
        if not key.startswith(b"\0"):  # else a slice of a partitioned variable, with its own key
            entries[key.decode("utf-8", "replace")] = stored
    if num_shards is None:
        raise ValueError("it has no header")
    return entries


def read_v1(paths: Sequence[Path]) -> dict[str, TensorEntry]:
    """Read and validate the entries of the files of a V1 checkpoint.

    Raises:
        ValueError: if a file is not a checkpoint, or an entry is invalid.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        if path.stat().st_size > 2**31 - 1:
            raise ValueError("it has over 2 GB, too many for a V1 checkpoint")
        with _mapped(path) as content:
            first = next(table(content, _MAX_LIST_BYTES), None)
        if first is None or first[0]:
            raise ValueError(f"{path.name} does not begin with a list of what is in it")
        for tensor in _parse(SavedTensorSlices, first[1], b"").meta.tensor:
            key = tensor.name.encode()
            stored = TensorEntry(_shape(tensor.shape, key), _dtype(tensor.type, key))
            _check_slices(tensor.slice, stored.shape, key)
            entries[tensor.name] = stored
    return entries


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path.name} is empty, or not a file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def table(
    content: bytes | mmap.mmap, max_value_bytes: int = MAX_INDEX_BYTES
) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the keys and values of a table, in order.

    Raises:
        ValueError: if it is damaged, its blocks overlap, or it has more, or larger, keys or values
            than any checkpoint.
    """
    if len(content) < _FOOTER_BYTES or content[-8:] != struct.pack("<Q", _MAGIC):
        raise ValueError("it is not a TensorFlow table, or it is truncated")
    footer = content[-_FOOTER_BYTES:]
    _, position = _handle(footer, 0)
    index, _ = _handle(footer, position)
    num_keys = num_bytes = end = 0
    for num_blocks, (_, value) in enumerate(_block(content, *index, max_value_bytes), 1):
        (offset, size), _ = _handle(value, 0)
        if offset < end:
            raise ValueError(f"its block at {offset:,} overlaps the block before it")
        if num_blocks > _MAX_KEYS:
            raise ValueError(f"it has over {_MAX_KEYS:,} blocks, too many for a checkpoint")
        end = offset + size + _BLOCK_TRAILER_BYTES
        for key, entry in _block(content, offset, size, max_value_bytes):
            num_keys += 1
            num_bytes += len(key)
            if num_keys > _MAX_KEYS or num_bytes > _MAX_BYTES_OF_KEYS:
                raise ValueError(
                    f"it has over {_MAX_KEYS:,} keys, or over {_MAX_BYTES_OF_KEYS:,} bytes of "
                    "keys, too many for a checkpoint"
                )
            yield key, entry


def _block(
    content: bytes | mmap.mmap, offset: int, size: int, max_value_bytes: int
) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the prefix-compressed keys and the values of a block."""
    if offset + size + _BLOCK_TRAILER_BYTES > len(content):
        raise ValueError("one of its blocks lies outside of the file")
    if content[offset + size]:
        raise ValueError("it is compressed; write the checkpoint again with TensorFlow")
    restarts = struct.unpack_from("<I", content, offset + size - 4)[0] if size >= 4 else 0
    end = offset + size - 4 * (restarts + 1)
    position, key = offset, b""
    while position < end:
        shared, position = _varint(content, position)
        added, position = _varint(content, position)
        length, position = _varint(content, position)
        if shared > len(key) or position + added + length > end:
            raise ValueError("one of its entries lies outside of its block")
        if shared + added > _MAX_KEY_BYTES or length > max_value_bytes:
            raise ValueError(
                f"one of its entries has {shared + added:,} bytes of key and {length:,} "
                "of value, too many for a checkpoint"
            )
        key = key[:shared] + content[position : position + added]
        position += added
        yield key, content[position : position + length]
        position += length


def _handle(content: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _varint(content, position)
    size, position = _varint(content, position)
    return (offset, size), position


def _varint(content: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("it has an unterminated varint")


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
        raise ValueError(f"its entry {_show(key)} has shape {list(shape)}, which is too large")
    return shape


def _dtype(number: int, key: bytes) -> tf.DType:
    try:
        return tf.as_dtype(number)
    except TypeError:
        raise ValueError(f"its entry {_show(key)} has elements of unknown type {number}") from None


def _check_slices(slices: Sequence[TensorSliceProto], shape: tuple[int, ...], key: bytes) -> int:
    """Check slices against the full shape; returns their total number of extents."""
    if len(slices) * max(1, len(shape)) > _MAX_EXTENTS:
        raise ValueError(f"its entry {_show(key)} has {len(slices):,} slices, too many")
    for extents in slices:
        _check_slice(extents, shape, key)
    return len(slices) * max(1, len(shape))


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
