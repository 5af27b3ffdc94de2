"""Change checkpoint tables, with valid checksums."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable

from common import Base, Generator, Message, pick
from protobufs import DTYPES, INTEGERS, change_shape, serialized, some_field

_MAGIC = 0xDB4775248B80FB57


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(content: bytes) -> int:
    """The checksum of tables and records: CRC-32C, masked."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_block(content: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    if content[offset + size]:
        raise NotImplementedError("a compressed table")
    block = content[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    pairs, key, at = [], b"", 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        pairs.append((key, block[at + rest : at + rest + length]))
        at += rest + length
    return pairs


def read_table(content: bytes) -> list[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table: an ``.index`` file or a V1 checkpoint."""
    _, at = _varint(content, len(content) - 48)
    _, at = _varint(content, at)
    offset, at = _varint(content, at)
    size, _ = _varint(content, at)
    pairs = []
    for _, handle in _read_block(content, offset, size):
        start, at = _varint(handle, 0)
        length, _ = _varint(handle, at)
        pairs += _read_block(content, start, length)
    return pairs


def write_table(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Write a table with one block."""
    out = bytearray()

    def write_block(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
        block, restarts = bytearray(), []
        for key, value in entries:
            restarts.append(len(block))
            block += b"\0" + _to_varint(len(key)) + _to_varint(len(value)) + key + value
        restarts = restarts or [0]
        block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        handle = _to_varint(len(out)) + _to_varint(len(block))
        out.extend(block + b"\0" + struct.pack("<I", masked_crc32c(bytes(block) + b"\0")))
        return handle

    pairs = list(pairs)
    data = write_block(pairs)
    meta = write_block([])
    index = write_block([(pairs[-1][0] + b"\xff" if pairs else b"", data)])
    return bytes(out) + (meta + index).ljust(40, b"\0") + struct.pack("<Q", _MAGIC)


def _change_pairs(pairs: list[tuple[bytes, bytes]], kind: str, rng: Generator) -> str:
    """Change one value, as a protobuf message, or one key."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
    from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

    position = 0 if rng.random() < 0.2 else int(rng.integers(len(pairs)))
    key, value = pairs[position]
    choice = rng.random()
    if choice < 0.1:
        del pairs[position]
        return "entry_lost"
    if choice < 0.2:
        pairs[position] = (pick((b"", b"\xff\xfe", b"x" * 9999, pairs[-1][0]), rng), value)
        return "key_changed"
    if choice < 0.25:
        pairs[position] = (key, rng.bytes(int(rng.integers(50))))
        return "value_scrambled"
    if choice < 0.3:
        rng.shuffle(pairs)  # type: ignore[arg-type]
        return "unsorted"
    message = (
        SavedTensorSlices if kind == "v1" else BundleEntryProto if key else BundleHeaderProto
    )()
    with contextlib.suppress(DecodeError):  # changed twice
        message.ParseFromString(value)
    if kind != "v1" and key and rng.random() < 0.5:
        done = _change_entry(message, rng)
    elif kind == "v1" and not key and message.meta.tensor and rng.random() < 0.5:
        tensor = pick(message.meta.tensor, rng)
        change_shape(tensor.shape, rng)
        done = "shape"
    else:
        done = some_field(message, rng)
    pairs[position] = (key, serialized(message))
    return done


def _change_entry(entry: Message, rng: Generator) -> str:
    choice = pick(("shape", "dtype", "shard_id", "offset", "size", "slices"), rng)
    if choice == "shape":
        change_shape(entry.shape, rng)
    elif choice == "dtype":
        entry.dtype = pick(DTYPES, rng)
    elif choice == "slices":
        part = entry.slices.add()
        for _ in range(int(rng.integers(6))):
            part.extent.add(start=pick(INTEGERS, rng), length=pick(INTEGERS, rng))
    else:
        top = 2**31 if choice == "shard_id" else 2**63
        setattr(entry, choice, pick([n for n in INTEGERS if -top <= n < top], rng))
    return choice


def change_table(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    pairs = read_table(content)
    done = [_change_pairs(pairs, base.kind, rng) for _ in range(int(rng.choice([1, 1, 3])))]
    return write_table(pairs), "+".join(done)
