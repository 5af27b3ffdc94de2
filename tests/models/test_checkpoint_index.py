"""Valid indexes are read like in TensorFlow; malicious ones are rejected quickly."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from transfer.models import checkpoint_index

HEADER = (b"", b"\x08\x01")
ENTRY = b"\x08\x01\x12\x00\x28\x04"  # a scalar of float32


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def block(entries: Sequence[tuple[int, bytes, bytes]]) -> bytes:
    """Entries: length of the prefix shared with the previous key, rest of the key, value."""
    parts = [varint(s) + varint(len(k)) + varint(len(v)) + k + v for s, k, v in entries]
    return b"".join(parts) + struct.pack("<II", 0, 1)


def table(blocks: Sequence[bytes], handles: Sequence[tuple[int, int]] | None = None) -> bytes:
    """A file of these blocks; ``handles`` (offset, size) override their real positions."""
    content, places = b"", []
    for one in blocks:
        places.append((len(content), len(one)))
        content += one + bytes(5)
    chosen = places if handles is None else handles
    top = block([(0, b"%08d" % i, varint(o) + varint(n)) for i, (o, n) in enumerate(chosen)])
    footer = b"\0\0" + varint(len(content)) + varint(len(top))
    return (
        content
        + top
        + bytes(5)
        + footer.ljust(40, b"\0")
        + struct.pack("<Q", checkpoint_index._MAGIC)
    )


def test_many_blocks_are_read_as_tensorflow_reads_them(tmp_path: Path) -> None:
    names = [f"scope/{'long_name_' * (i % 7)}{i}/weights" for i in range(4000)]
    values = [tf.zeros([i % 5, 2], [tf.float32, tf.int64][i % 2]) for i in range(4000)]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "m"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=values,
    )
    content = (tmp_path / "m.index").read_bytes()
    (top, _), _ = checkpoint_index._handle(
        content[-48:], checkpoint_index._handle(content[-48:], 0)[1]
    )
    assert top > 2 * 2**12  # TensorFlow ends a block after 4 KB or more
    found = checkpoint_index.read_v2(tmp_path / "m.index")
    assert found == {
        name: checkpoint_index.TensorEntry(tuple(value.shape), value.dtype)
        for name, value in zip(names, values, strict=True)
    }
    reader = tf.train.load_checkpoint(str(tmp_path / "m"))
    assert reader.get_variable_to_shape_map() == {n: list(s.shape) for n, s in found.items()}


def test_third_party_indexes_are_read(shared_wild: Path) -> None:
    paths = sorted(shared_wild.rglob("*.index"))
    assert paths
    for path in paths:
        reader = tf.train.load_checkpoint(str(path.with_suffix("")))
        shapes = {key: list(stored.shape) for key, stored in checkpoint_index.read_v2(path).items()}
        assert shapes == reader.get_variable_to_shape_map(), path


def looped(num_handles: int) -> bytes:
    one = block([(0, *HEADER), *((0, b"%05x" % i, ENTRY) for i in range(5000))])
    return table([one], [(0, len(one))] * num_handles)


def overlapping() -> bytes:
    one = block([(0, *HEADER), (0, b"a", ENTRY)])
    return table([one], [(0, len(one)), (len(one) - 8, 8)])


def backwards() -> bytes:
    first, second = block([(0, *HEADER)]), block([(0, b"a", ENTRY)])
    return table([second, first], [(len(second) + 5, len(first)), (0, len(second))])


def long_keys() -> bytes:
    """20,000 keys of 15,000 bytes, 300 MB, in a file of 220 KB."""
    entries = [(0, *HEADER), (0, b"k" * 15_000, ENTRY)]
    return table([block(entries + [(14_990, b"%07d" % i, ENTRY) for i in range(20_000)])])


def many_keys() -> bytes:
    return table([block([(0, *HEADER), *((0, b"%07d" % i, ENTRY) for i in range(270_000))])])


def many_slices() -> bytes:
    value = b"\x08\x01\x12\x00" + b"\x3a\x00" * 300_000
    return table([block([(0, *HEADER), (0, b"a", value), (0, b"b", value)])])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: looped(40_000), "its block at 0 overlaps the block before it"),
        (overlapping, r"its block at \d+ overlaps the block before it"),
        (backwards, "its block at 0 overlaps the block before it"),
        (long_keys, "over 67,108,864 bytes of keys, too many for a checkpoint"),
        pytest.param(many_keys, "it has over 262,144 keys", marks=pytest.mark.slow),
        (many_slices, "has 300,000 slices, too many"),
        (lambda: table([block([(0, b"k" * 20_000, ENTRY)])]), "20,000 bytes of key"),
        (lambda: table([block([(0, b"k", bytes(2**21))])]), "2,097,152 of value, too many"),
        (lambda: bytes(2**25 + 1), "over 33,554,432 bytes, too many for an index"),
        (lambda: b"", "it is not a TensorFlow table, or it is truncated"),
    ],
)
def test_malicious_indexes_are_rejected_quickly(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "m.index"
    path.write_bytes(make())
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        checkpoint_index.read_v2(path)
    assert time.process_time() - start < 20


def test_malicious_v1_checkpoints_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="m is empty, or not a file"):
        checkpoint_index.read_v1([path])
    with path.open("wb") as file:  # 2 GB, sparse
        file.truncate(2**31 - 1)
    with pytest.raises(ValueError, match="not a TensorFlow table"):
        checkpoint_index.read_v1([path])
    path.write_bytes(table([block([(0, b"", bytes(2**24 + 1))])]))
    with pytest.raises(ValueError, match="16,777,217 of value, too many"):
        checkpoint_index.read_v1([path])


def test_a_v1_checkpoint_with_large_values_is_read(tmp_path: Path) -> None:
    large = tf.constant(np.zeros((1100, 1000), np.float32))
    tf.raw_ops.Save(filename=str(tmp_path / "m"), tensor_names=["a"], data=[large])
    assert checkpoint_index.read_v1([tmp_path / "m"]) == {
        "a": checkpoint_index.TensorEntry((1100, 1000), tf.float32)
    }
